"""Fetch a real language model and rated film reviews from the package index, without the Hugging Face hub.

  python -m examples.real_model                    into logs/real

Writes `smollm2-135m-instruct/`, a plain Hugging Face folder, and
`movie_reviews.jsonl`, 10,605 sentences with the mean rating of 20 people.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from src.models.loading import load_causal_lm, load_tokenizer
from src.models.settings import ModelSettings
from src.utils.exits import friendly_errors
from src.utils.output import set_up_output
from src.utils.terminal import say

PINS = Path(__file__).with_name("real.txt")
MODEL, REVIEWS = "smollm2-135m-instruct", "movie_reviews.jsonl"
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, from a GGUF file

The weights of [HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) as they
come out of the Q4_1 file in the package `{wheel}` (Apache-2.0): they were rounded to four bits, and are stored here
as float32. They are close to the original weights, not equal to them.
"""


def fetch(folder: Path) -> list[Path]:
    """Download the packages of `real.txt` into `folder`; pip refuses a file of another checksum."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--requirement", str(PINS), "--dest", str(folder)], check=True)
    return sorted(folder.iterdir())


def write_model(wheel: Path, folder: Path) -> None:
    """The GGUF file in a wheel as a plain folder with a card."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = archive.extract(name, scratch)
        load_causal_lm(ModelSettings(path=file, fast_cpu=False)).save_pretrained(folder)
        load_tokenizer(file).save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(wheel=wheel.name), encoding="utf-8")


def write_reviews(source: Path, file: Path) -> int:
    """The rated film reviews in the source archive of VADER as JSON lines; returns how many."""
    with tarfile.open(source) as outer:
        inner = next(member for member in outer if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as resources:  # type: ignore[union-attr]
            table = resources.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            lines = table.read().decode("utf-8").splitlines()  # type: ignore[union-attr]
    rows = [line.split("\t") for line in lines]
    texts = [json.dumps({"id": i, "rating": float(r), "text": text}, ensure_ascii=False) for i, r, text in rows]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return len(texts)


def prepare(target: Path) -> None:
    """Fetch and write what is not there yet; a half-written folder is never left under its name."""
    if (target / MODEL).is_dir() and (target / REVIEWS).is_file():
        say(f"{target} holds the model and the reviews")
        return
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        say("downloading a language model (93 MB) and rated film reviews")
        packages = Path(scratch) / "packages"
        packages.mkdir()
        wheel, source = fetch(packages)
        unfinished = Path(scratch) / MODEL
        write_model(wheel, unfinished)
        rows = write_reviews(source, Path(scratch) / REVIEWS)
        shutil.rmtree(target / MODEL, ignore_errors=True)
        unfinished.rename(target / MODEL)
        (Path(scratch) / REVIEWS).rename(target / REVIEWS)
    say(f"{target / MODEL}: SmolLM2-135M-Instruct\n{target / REVIEWS}: {rows} rated sentences")


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.real_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="logs/real", help="where to write (default: logs/real)")
    target = Path(parser.parse_args().folder)
    set_up_output()
    with friendly_errors([]):
        try:
            prepare(target)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "the packages of examples/real.txt cannot be downloaded; where there is the Hugging Face hub, "
                "the model is model.path=HuggingFaceTB/SmolLM2-135M-Instruct"
            ) from error


if __name__ == "__main__":
    main()
