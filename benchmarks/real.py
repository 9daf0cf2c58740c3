"""Film reviews by a real language model, several seeds: the pipeline, then fluency under the untouched model.

    python -m examples.real_model
    python -m benchmarks.real --seeds 1 2 3

Writes benchmarks/results/real.json and real.md, pairs of the first seed to real_samples.md, and docs/real.png: gold,
score and fluency against the KL, held out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as Picture
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.seeds import RESULTS, cell, result_of, run, table
from src.core.padding import pad_left
from src.loggers.csv import read_table
from src.models.loading import load_causal_lm, load_tokenizer
from src.models.settings import ModelSettings
from src.utils.statistics import as_result, bootstrap_mean

FOLDER = Path("logs/real")
MODEL, REVIEWS = FOLDER / "smollm2-135m-instruct", FOLDER / "movie_reviews.jsonl"
PANELS = {
    "gold: VADER, never trained on": "gold",
    "score: reward model": "score",
    "nats per token under the reference": "reference_nats",
}
FLUENCY = (
    ("nats per token under the untouched model, SFT policy", "sft", "untouched_nats"),
    ("nats per token under the untouched model, PPO policy", "ppo", "untouched_nats"),
    ("... after minus before", "improvement", "untouched_nats"),
    ("distinct bigrams, SFT policy", "sft", "distinct_2"),
    ("distinct bigrams, PPO policy", "ppo", "distinct_2"),
)


@torch.no_grad()
def untouched_nats(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], responses: list[str]
) -> list[float]:
    """-log p(response | prompt) per token of each response under a model that was not trained here, nats."""
    means = []
    for start in range(0, len(prompts), 16):
        part = slice(start, start + 16)
        asked = [tokenizer(prompt)["input_ids"] for prompt in prompts[part]]
        whole = [tokenizer(p + r)["input_ids"] for p, r in zip(prompts[part], responses[part], strict=True)]
        ids, mask = pad_left(whole, tokenizer.pad_token_id)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = lm(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits[:, :-1].float()
        nats = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        for row, prompt, text in zip(nats, asked, whole, strict=True):
            means.append(
                row[len(row) + 1 - len(text) + len(prompt) - 1 :].mean().item() if len(text) > len(prompt) else 0.0
            )
    return means


def with_fluency(result: dict[str, Any], folder: Path, lm: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """The result with the nats of both policies' answers under the untouched model, and how much they rise."""
    rows = [json.loads(line) for line in (folder / "comparison.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts, nats = [row["prompt"] for row in rows], {}
    for role in ("sft", "ppo"):
        nats[role] = untouched_nats(lm, tokenizer, prompts, [row[role]["response"] for row in rows])
    return with_figure(result, "untouched_nats", nats["sft"], nats["ppo"], prompts)


def with_figure(
    result: dict[str, Any], name: str, before: list[float], after: list[float], groups: list[str]
) -> dict[str, Any]:
    """The result with the mean of a number under both policies, and of how much it rises, with intervals."""
    changes = [y - x for x, y in zip(before, after, strict=True)]
    for role, values in {"sft": before, "ppo": after, "improvement": changes}.items():
        for key, value in as_result({name: bootstrap_mean(values, groups)}).items():
            result[role][key] = result[role][key] | value if isinstance(value, dict) else value
    return result


def fluency(results: dict[int, dict[str, Any]]) -> str:
    """Rows of the table: fluency before and after."""
    rows = [[title, *(cell(result, *name) for result in results.values())] for title, *name in FLUENCY]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def samples(folder: Path, rows: int) -> str:
    """Pairs of answers to the same prompts, as a table."""
    lines = (folder / "comparison.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    table = ["| prompt | before PPO | after PPO |", "|---|---|---|"]
    for row in map(json.loads, lines):
        cells = [row["prompt"], row["sft"]["response"], row["ppo"]["response"]]
        table.append("| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in cells) + " |")
    return "\n".join(table) + "\n"


def draw(folders: dict[int, Path], path: Path) -> None:
    """Each measure on held-out prompts against the KL, one line per seed, with 95% intervals."""
    picture = Picture(figsize=(11, 3.6), layout="constrained")
    for axis, (title, name) in zip(picture.subplots(1, 3), PANELS.items(), strict=True):
        for seed, folder in folders.items():
            rows = [row for _, row in sorted(read_table(folder / "metrics.csv").items()) if "held_out/kl" in row]
            x, y = [row["held_out/kl"] for row in rows], [row[f"held_out/{name}"] for row in rows]
            ends = [
                [abs(row[f"held_out/{name}_{e}"] - v) for row, v in zip(rows, y, strict=True)] for e in ("low", "high")
            ]
            axis.errorbar(x, y, ends, marker="o", markersize=4, linewidth=1.2, label=f"seed {seed}")
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("KL to the reference (nats per sequence)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    picture.savefig(path, dpi=110)


def trained(seed: int, overrides: list[str]) -> Path:
    """The folder of the pipeline of a seed; one of the same code that has ended is kept."""
    return run("movie_reviews", "real", seed, [f"model.path={MODEL}", f"data.path={REVIEWS}", *overrides])


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("overrides", nargs="*", help="further overrides of the pipeline, after --")
    arguments = parser.parse_intermixed_args()
    pipelines = {seed: trained(seed, arguments.overrides) for seed in arguments.seeds}
    folders = {seed: pipeline / "ppo" for seed, pipeline in pipelines.items()}
    lm, tokenizer = load_causal_lm(ModelSettings(path=str(MODEL))), load_tokenizer(str(MODEL))
    results = {
        seed: with_fluency(result_of(pipeline), folders[seed], lm, tokenizer) for seed, pipeline in pipelines.items()
    }
    text = table(results) + fluency(results)
    (RESULTS / "real.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "real.md").write_text(text, encoding="utf-8")
    (RESULTS / "real_samples.md").write_text(samples(folders[arguments.seeds[0]], 20), encoding="utf-8")
    draw(folders, Path("docs/real.png"))
    print(text)


if __name__ == "__main__":
    main()
