"""PPO-ptx on film reviews (ppo.ptx_coef): what its loss keeps of the language model, next to PPO without it.

    python -m examples.real_model
    python -m benchmarks.real --seeds 1
    python -m benchmarks.ptx --coefs 0.3 1

The runs continue from the SFT and the reward model of seed 1 of benchmarks.real, whose PPO is the first column, with
the same prompts and random numbers. Writes benchmarks/results/ptx.json and ptx.md: gold and KL; fluency of the answers;
how well each policy still predicts sentences by people that none of its stages has seen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.quantized import SHARED
from benchmarks.real import MODEL, REVIEWS, untouched_nats, with_fluency
from benchmarks.seeds import RESULTS, cell, newest, newest_result
from src.data.rated_sentences import RatedSentences
from src.models.loading import load_causal_lm, load_tokenizer
from src.models.settings import ModelSettings
from src.utils.statistics import as_result, bootstrap_mean

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


def trained(pipeline: Path, coef: str) -> Path:
    """The folder of a PPO run with the pipeline's models; one that has ended is kept."""
    name = f"ptx-{coef}"
    if not list(Path("logs/ppo").glob(f"{name}/result.json")):
        models = (f"model.path={pipeline / 'sft' / 'model'}", f"reward.path={pipeline / 'reward'}")
        given = (*SHARED, *models, "seed=1", f"ppo.ptx_coef={coef}", f"name={name}")
        subprocess.run([sys.executable, "-m", "src.train", *given], check=True)
    return newest_result(Path("logs/ppo"), name).parent


def people_nats(model: Path, sentences: list[tuple[str, str]]) -> list[float]:
    """-log p per token of the rest of each sentence after its first words, nats."""
    lm, tokenizer = load_causal_lm(ModelSettings(path=str(model))), load_tokenizer(str(model))
    prompts, rests = zip(*sentences, strict=True)
    return untouched_nats(lm, tokenizer, list(prompts), list(rests))


def with_people(result: dict[str, Any], before: list[float], after: list[float]) -> dict[str, Any]:
    """The result with the nats of people's sentences under both policies."""
    nats = {"sft": before, "ppo": after, "improvement": [y - x for x, y in zip(before, after, strict=True)]}
    for group, values in nats.items():
        for name, value in as_result({"people_nats": bootstrap_mean(values)}).items():
            result[group][name] = result[group][name] | value if isinstance(value, dict) else value
    return result


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
    if not list(Path("logs/pipeline").glob("seeds-real-1*/result.json")):
        parser.error("no run of seed 1 is in logs/pipeline: python -m benchmarks.real --seeds 1 makes it")
    pipeline = newest("real", 1).parent
    folders = {"0": pipeline / "ppo", **{coef: trained(pipeline, coef) for coef in coefs}}
    source = RatedSentences(str(REVIEWS), max_words=24)
    prompts = [row.prompt for row in source.prompts("test")[:SENTENCES]]
    sentences = [(p, text.removeprefix(p)) for p, text in zip(prompts, source.texts("test"), strict=False)]
    lm, tokenizer = load_causal_lm(ModelSettings(path=str(MODEL))), load_tokenizer(str(MODEL))
    before, results = people_nats(pipeline / "sft" / "model", sentences), {}
    for coef, folder in folders.items():
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        found = with_fluency(found, folder, lm, tokenizer)
        results[coef] = with_people(found, before, people_nats(folder / "model", sentences))
    (RESULTS / "ptx.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "ptx.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
