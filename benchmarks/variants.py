"""The embedded task with a setting one way and another, over several seeds.

    python -m benchmarks.variants lag --seeds 1 2 3 4 5
    python -m benchmarks.variants critic_layers --seeds 1 2 3 4 5
    .venv-vllm/bin/python -m benchmarks.variants rollout_engines --seeds 1 2 3

All runs of a seed share its SFT policy, its reward model, its prompts and its random numbers. Writes
benchmarks/results/STUDY.json (the figures of every seed, and means of what the iterations logged) and STUDY.md (the
table).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.seeds import EXPLAINED, RESULTS, cell, logged_means, newest_result
from src.report.compare import mean_with_interval
from src.utils.statistics import Figure

HEADS_OF_32 = "model.scratch.config.n_head=3"  # vLLM has no smaller ones on a CPU
STUDIES: dict[str, dict[str, tuple[str, ...]]] = {
    "lag": {
        "in time": ("rollout.lag=0",),
        "one behind, corrected": ("rollout.lag=1", "correction=truncate"),
        "one behind, not corrected": ("rollout.lag=1",),
    },
    "critic_layers": {
        "critic adapts all three layers": (),
        "critic adapts the top layer": ("model.lora.critic_layers=1",),
    },
    "rollout_engines": {"local": (HEADS_OF_32,), "vLLM": (HEADS_OF_32, "engine=vllm")},
}
FIGURES = (
    ("gold, PPO policy", "gold"),
    ("score, PPO policy", "score"),
    ("KL to the reference (nats per sequence)", "kl"),
)
LOGGED = (("explained variance of the critic", EXPLAINED),)
OF_LAG = (  # logged by every run, and 0 or 1 where the policy samples for itself
    ("KL of the policy that sampled (nats per token)", "rollout/behavior_kl"),
    ("largest ratio to the policy that sampled", "rollout/behavior_ratio_max"),
    ("effective sample size", "rollout/effective_sample_size"),
    ("share of tokens that the cap changes", "rollout/capped_fraction"),
)
Results = dict[str, dict[int, dict[str, Any]]]  # by variant and seed


def run(study: str, variant: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One training run in a separate process: its result, and `logged`, the means over its iterations."""
    name = f"{study}-{variant.replace(',', '').replace(' ', '-')}-{seed}"
    settings = STUDIES[study][variant]
    command = [sys.executable, "-m", "src.train", *settings, f"seed={seed}", f"name={name}", "resume=never"]
    subprocess.run([*command, *overrides], check=True)
    result = newest_result(Path("logs/ppo"), name)
    means = logged_means(result.parent / "metrics.csv", [key for _, key in (*LOGGED, *OF_LAG)])
    return json.loads(result.read_text(encoding="utf-8")) | {"logged": means}


def over_seeds(values: list[float]) -> str:
    """The mean, with several values also Student's 95% interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    figure: Figure = mean_with_interval(values)
    low, high = figure.interval or (figure.value, figure.value)
    return f"{figure.value:.3f} ({low:.3f} to {high:.3f})"


def table(results: Results) -> str:
    """Markdown: a row for each figure and variant, a column for each seed, and the mean over seeds."""
    seeds = list(next(iter(results.values())))
    lines = [
        "| | | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean over seeds |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    for title, name in FIGURES:
        for variant, by_seed in results.items():
            cells = [cell(result, "ppo", name) for result in by_seed.values()]
            mean = over_seeds([result["ppo"][name] for result in by_seed.values()])
            lines.append(f"| {title} | {variant} | " + " | ".join([*cells, mean]) + " |")
    lags = any("rollout/effective_sample_size" in r["logged"] for by in results.values() for r in by.values())
    for title, key in (*LOGGED, *OF_LAG) if lags else LOGGED:
        for variant, by_seed in results.items():
            values = [result["logged"][key] for result in by_seed.values() if key in result["logged"]]
            if values:
                cells = [f"{value:.2g}" if value < 0.1 else f"{value:.3f}" for value in values]
                lines.append(f"| {title}, mean over iterations | {variant} | " + " | ".join([*cells, ""]) + "|")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("overrides", nargs="*", help="further overrides of every run, after --")
    given = parser.parse_intermixed_args()
    variants = STUDIES[given.study]
    by_seed = {s: {name: run(given.study, name, s, given.overrides) for name in variants} for s in given.seeds}
    results: Results = {name: {seed: found[name] for seed, found in by_seed.items()} for name in variants}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{given.study}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{given.study}.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
