"""Every study of docs/results.md: run those whose code has changed since, one after another; write the page's tables.

    python -m benchmarks.studies                 run what is missing or older than its code (some hours)
    python -m benchmarks.studies sentiment real  run these
    python -m benchmarks.studies --repeat real   run the first seed again, and compare with what is recorded
    python -m benchmarks.studies --list          say what is current
    python -m benchmarks.studies --page          write the tables into docs/results.md

A study that has ended is kept, so the same command goes on after an interruption. benchmarks/results/index.json says of
each by which commit, when and where it was measured, and digests of the code that made its numbers; also of the last
repetition whose figures were all equal.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from benchmarks.provenance import ROOT, rooms, source
from benchmarks.repeats import repeated

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
INDEX = RESULTS / "index.json"
BLOCK = re.compile(r"<!-- (studies|[\w.]+\.md) -->\n.*?<!-- end -->", re.DOTALL)
REAL = ("model.path=logs/real/smollm2-135m-instruct",)


@dataclass(frozen=True)
class Study:
    """A command of this repository and the files it leaves in benchmarks/results."""

    name: str
    title: str
    command: tuple[str, ...]
    files: tuple[str, ...]
    folder: str | None = None  # where in logs/ it writes the files, and a picture for docs/, instead
    needs_model: bool = False  # logs/real
    needs_vllm: bool = False  # .venv-vllm
    has_seeds: bool = True  # takes --seeds, which end at `--`

    @property
    def script(self) -> str:
        """The file or folder of the command."""
        path = self.command[0].replace(".", "/")
        return path if (ROOT / path).is_dir() else f"{path}.py"

    @property
    def once(self) -> tuple[str, ...]:
        """Arguments that run the first seed only; those given last hold."""
        given, dashes, overrides = " ".join(self.command).partition(" -- ")
        return tuple(f"{given} --seeds 1{dashes}{overrides}".split()) if self.has_seeds else self.command


def seeds(name: str, title: str, *arguments: str, needs_model: bool = False) -> Study:
    """A study by benchmarks.seeds."""
    return Study(name, title, ("benchmarks.seeds", *arguments), (f"{name}.json", f"{name}.md"), needs_model=needs_model)


def variants(name: str, title: str, *arguments: str, needs_vllm: bool = False) -> Study:
    """A study by benchmarks.variants."""
    command = ("benchmarks.variants", name, *arguments)
    return Study(name, title, command, (f"{name}.json", f"{name}.md"), needs_vllm=needs_vllm)


FIVE = ("--seeds", "1", "2", "3", "4", "5")
STUDIES = (
    seeds("sentiment", "the embedded default", "sentiment", *FIVE),
    seeds(
        "sentiment_top", "adapters in the top layers", "sentiment", "--name", "sentiment_top", *FIVE, "--",
        "model.lora.layers=2",
    ),
    seeds("arithmetic", "sums with a verifier", "arithmetic"),
    Study(
        "real", "a real language model", ("benchmarks.real",), ("real.json", "real.md", "real_samples.md"),
        needs_model=True,
    ),
    Study(
        "quantized", "a base in 4 and 8 bits", ("benchmarks.quantized",), ("quantized.json", "quantized.md"),
        needs_model=True, has_seeds=False,
    ),
    Study("ptx", "the PPO-ptx loss", ("benchmarks.ptx",), ("ptx.json", "ptx.md"), needs_model=True, has_seeds=False),
    seeds("haystack", "a question about a text, by a real language model", "haystack", "--", *REAL, needs_model=True),
    Study(
        "estimators", "what each Phi_t does to the gradient", ("studies.estimators", "name=results"),
        ("estimators.json", "estimators.md"), "estimators", has_seeds=False,
    ),
    Study(
        "kl_variance", "the KL's two forms: variance", ("studies.kl", "name=results"),
        ("kl_variance.json", "kl_variance.md"), "kl", has_seeds=False,
    ),
    Study("kl_forms", "the KL's two forms: gold", ("benchmarks.kl_forms",), ("kl_forms.json", "kl_forms.md")),
    Study(
        "fixed_points", "the KL's settings and their optimum", ("tests.objectives.fixed_points",),
        ("fixed_points.md",),
    ),
    Study("learning", "every Phi_t and every policy loss", ("benchmarks.learning",), ("learning.json", "learning.md")),
    variants("lag", "one step behind"),
    variants("critic_layers", "a critic with fewer adapters"),
    variants("rollout_engines", "vLLM as the engine", "--seeds", "1", "2", "3", needs_vllm=True),
    Study(
        "overoptimization", "overoptimization of a weak reward", ("benchmarks.overoptimization",),
        ("overoptimization.json", "overoptimization.md"),
    ),
)  # fmt: skip


def read_index() -> dict[str, Any]:
    """What is known of each study that was run."""
    return dict(json.loads(INDEX.read_text(encoding="utf-8"))) if INDEX.is_file() else {}


def changed(study: Study, index: dict[str, Any]) -> list[str]:
    """The rooms whose code has changed since the study was run or repeated; all of them if that was not recorded."""
    recorded, now = index.get(study.name, {}), rooms(study.script)
    known = [entry.get("rooms", {}) for entry in (recorded, recorded.get("repeated", {}))]
    return min(([room for room, digest in now.items() if old.get(room) != digest] for old in known), key=len)


def execute(study: Study, command: tuple[str, ...]) -> None:
    """Run a command of the study and collect its files."""
    if study.needs_model:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", "constraints.txt", "-e", ".[quantize,real]"], cwd=ROOT, check=True)
        subprocess.run([sys.executable, "-m", "examples.real_model"], cwd=ROOT, check=True)
    if study.needs_vllm:
        subprocess.run(["make", "vllm"], cwd=ROOT, check=True)
    python = str(ROOT / ".venv-vllm" / "bin" / "python") if study.needs_vllm else sys.executable
    subprocess.run([python, "-m", *command], cwd=ROOT, check=True)
    if study.folder is not None:
        made = max((ROOT / "logs" / study.folder).glob("results*"), key=lambda folder: folder.stat().st_mtime)
        for file in made.iterdir():
            if file.name in study.files or file.suffix == ".png":
                shutil.copy(file, RESULTS if file.name in study.files else PAGE.parent)


def run(study: Study) -> None:
    """Run the study and record where its files come from."""
    before = {"rooms": rooms(study.script)}  # the code at the start: what changes meanwhile is not what was measured
    execute(study, study.command)
    write_index(read_index() | {study.name: source() | before})


def repeat(study: Study) -> None:
    """Run the first seed again; when every figure is the recorded one, record that. Raises `SystemExit` otherwise."""
    tables = [RESULTS / name for name in study.files if name.endswith(".json")]
    if study.name not in read_index() or not tables:
        raise SystemExit(
            f"{study.name}: no figures are recorded that a repetition could be compared with: run it whole"
        )
    before, written = {"rooms": rooms(study.script)}, [RESULTS / name for name in study.files]
    written += PAGE.parent.glob("*.png")
    unequal = repeated(lambda: execute(study, study.once), tables[0], written)
    if unequal:
        raise SystemExit("\n".join([f"{study.name}: {len(unequal)} figures are not the recorded ones", *unequal[:10]]))
    index = read_index()
    write_index(index | {study.name: index[study.name] | {"repeated": source() | before}})


def write_index(index: dict[str, Any]) -> None:
    """Write benchmarks/results/index.json."""
    INDEX.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def overview() -> str:
    """One row per study: what made it, and whether the code is still the same."""
    index = read_index()
    lines = ["| study | commit | date | processor | code since |", "|---|---|---|---|---|"]
    for study in STUDIES:
        found = index.get(study.name)
        if found is None:
            lines.append(f"| {study.title} | - | - | - | not run yet |")
            continue
        lines.append(
            f"| {study.title} | {found['commit']} | {found['date']} | {found['processor']} | {state(study, index)} |"
        )
    return "\n".join(lines) + "\n"


def state(study: Study, index: dict[str, Any]) -> str:
    """Whether the code of a study that was run is still the same, or gives the same."""
    if changed(study, index):
        return "changed"
    found = index[study.name]
    if found.get("rooms") == rooms(study.script):
        return "the same"
    return f"changed; seed 1 repeated at {found['repeated']['commit']}: equal"


def page(text: str) -> str:
    """The text of docs/results.md with the overview and every table as it is in benchmarks/results."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        table = overview() if name == "studies" else (RESULTS / name).read_text(encoding="utf-8")
        return f"<!-- {name} -->\n{table.rstrip()}\n<!-- end -->"

    return BLOCK.sub(block, text)


def write_page() -> None:
    """Write the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *(study.name for study in STUDIES)], metavar="STUDY")
    parser.add_argument("--repeat", action="store_true", help="run the first seed of these again and compare")
    parser.add_argument("--list", action="store_true", help="say what is current, and run nothing")
    parser.add_argument("--page", action="store_true", help="write the tables into docs/results.md, and run nothing")
    arguments = parser.parse_args()
    index = read_index()
    if arguments.list:
        for study in STUDIES:
            rooms_changed = ", ".join(changed(study, index))
            print(f"{study.name:18}", f"changed: {rooms_changed}" if rooms_changed else "current")
        return
    if not arguments.page:
        named = [study for study in STUDIES if study.name in arguments.names]
        for study in named or [study for study in STUDIES if changed(study, index)]:
            command = study.once if arguments.repeat else study.command
            print(f"== {study.name}: python -m {' '.join(command)}", flush=True)
            (repeat if arguments.repeat else run)(study)
    write_page()


if __name__ == "__main__":
    main()
