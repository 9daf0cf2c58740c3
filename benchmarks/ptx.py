"""PPO-ptx on film reviews (ppo.ptx_coef): what its loss keeps of the language model, next to PPO without it.

    python -m examples.real_model
    python -m benchmarks.ptx --coefs 0.3 1

The runs continue from the SFT and the reward model of seed 1 of benchmarks.real, which is run if it has not ended and
whose PPO is the first column, with the same prompts and random numbers. Writes benchmarks/results/ptx.json and ptx.md:
gold and KL; fluency of the answers; how well each policy still predicts sentences by people that none of its stages has
seen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.quantized import SHARED
from benchmarks.real import MODEL, trained, untouched_nats, with_figure, with_fluency
from benchmarks.seeds import RESULTS, cell, ended, newest_result
from src.config.compose import compose
from src.models.loading import load_causal_lm, load_tokenizer
from src.models.settings import ModelSettings
from src.stages.objects import instantiate
from src.types import Corpus

SENTENCES = 400
FIGURES = (
    ("gold, PPO policy", "ppo", "gold"),
    ("improvement of gold", "improvement", "gold"),
    ("improvement of the score", "improvement", "score"),
    ("KL to the reference (nats per sequence)", "ppo", "kl"),
    ("answers: nats per token under the untouched model, after minus before", "improvement", "untouched_nats"),
    ("answers: distinct bigrams, SFT policy", "sft", "distinct_2"),
    ("answers: distinct bigrams, PPO policy", "ppo", "distinct_2"),
    ("people's sentences: nats per token, SFT policy", "sft", "people_nats"),
    ("people's sentences: nats per token, PPO policy", "ppo", "people_nats"),
    ("people's sentences: ... after minus before", "improvement", "people_nats"),
)


def with_coef(pipeline: Path, coef: str) -> Path:
    """The folder of a PPO run with the pipeline's models; one that has ended is kept."""
    name = f"{pipeline.name}-ptx-{coef}"
    if not list(ended(Path("logs/ppo"), name)):
        models = (f"model.path={pipeline / 'sft' / 'model'}", f"reward.path={pipeline / 'reward'}")
        given = (*SHARED, *models, "seed=1", f"ppo.ptx_coef={coef}", f"name={name}")
        subprocess.run([sys.executable, "-m", "src.train", *given], check=True)
    return newest_result(Path("logs/ppo"), name).parent


def people_nats(model: Path, prompts: list[str], rests: list[str]) -> list[float]:
    """-log p per token of the rest of each sentence after its first words, nats."""
    lm, tokenizer = load_causal_lm(ModelSettings(path=str(model))), load_tokenizer(str(model))
    return untouched_nats(lm, tokenizer, prompts, rests)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each figure, a column for each weight of the PPO-ptx loss."""
    lines = [f"| | {' | '.join(f'ptx_coef={coef}' for coef in results)} |", "|---" * (len(results) + 1) + "|"]
    for title, group, name in FIGURES:
        lines.append(f"| {title} | {' | '.join(cell(found, group, name) for found in results.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coefs", nargs="+", default=["0.3", "1"])
    coefs = parser.parse_args().coefs
    pipeline = trained(1, [])
    folders = {"0": pipeline / "ppo", **{coef: with_coef(pipeline, coef) for coef in coefs}}
    corpus: Corpus = instantiate(compose([*SHARED]).data, "data")
    prompts = [row.prompt for row in corpus.prompts("test")[:SENTENCES]]
    texts = corpus.texts("test")[:SENTENCES]
    rests = [text.removeprefix(prompt) for prompt, text in zip(prompts, texts, strict=True)]
    lm, tokenizer = load_causal_lm(ModelSettings(path=str(MODEL))), load_tokenizer(str(MODEL))
    before, results = people_nats(pipeline / "sft" / "model", prompts, rests), {}
    for coef, folder in folders.items():
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        found = with_fluency(found, folder, lm, tokenizer)
        after = people_nats(folder / "model", prompts, rests)
        results[coef] = with_figure(found, "people_nats", before, after, prompts)
    (RESULTS / "ptx.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "ptx.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
