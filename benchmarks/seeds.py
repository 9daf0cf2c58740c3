"""Run the pipeline with several seeds and tabulate the figures.

    python -m benchmarks.seeds sentiment --seeds 1 2 3
    python -m benchmarks.seeds haystack -- model.path=logs/real/smollm2-135m-instruct
    python -m benchmarks.seeds sentiment --name sentiment_top --seeds 1 2 3 4 5 -- model.lora.layers=2

Writes benchmarks/results/NAME.json (every figure of every seed) and NAME.md (the table); NAME is EXPERIMENT unless
given. A seed that has ended in logs/pipeline is kept, as long as code, configuration and overrides are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.provenance import rooms
from src.loggers.csv import read_table

PIPELINES = Path("logs/pipeline")
RESULTS = Path(__file__).parent / "results"
EXPLAINED = "critic/explained_variance"
ROWS = (
    ("wall clock (s)", None, "seconds"),
    ("reward-model accuracy, clear pairs", "reward_model", "accuracy"),
    ("reward-model accuracy, all pairs", "reward_model", "accuracy_all_pairs"),
    ("gold, SFT policy", "sft", "gold"),
    ("gold, PPO policy", "ppo", "gold"),
    ("improvement of gold", "improvement", "gold"),
    ("score, SFT policy", "sft", "score"),
    ("score, PPO policy", "ppo", "score"),
    ("score of greedy responses, SFT policy", "sft", "greedy_score"),
    ("score of greedy responses, PPO policy", "ppo", "greedy_score"),
    ("KL to the reference (nats per sequence)", "ppo", "kl"),
    ("grammatical sentences, SFT policy", "sft", "grammatical"),
    ("grammatical sentences, PPO policy", "ppo", "grammatical"),
    ("distinct responses, PPO policy", "ppo", "distinct"),
    ("response length, SFT policy (tokens)", "sft", "response_length"),
    ("response length, PPO policy (tokens)", "ppo", "response_length"),
    ("ended by EOS, PPO policy", "ppo", "eos_fraction"),
    ("explained variance of the critic, mean over iterations", "logged", EXPLAINED),
)


def run(experiment: str, study: str, seed: int, overrides: list[str]) -> Path:
    """The folder of one pipeline in a separate process, or of that of the same code and overrides that has ended."""
    name = f"seeds-{study}-{seed}-{digest(experiment, overrides)}"
    if not list(ended(PIPELINES, name)):
        command = [sys.executable, "-m", "src.pipeline", f"experiment={experiment}", f"seed={seed}", f"name={name}"]
        subprocess.run([*command, "resume=never", *overrides], check=True)
    return newest_result(PIPELINES, name).parent


def digest(*given: Any) -> str:
    """Eight digits that differ where the code, its configuration or what is given do."""
    return hashlib.sha256(json.dumps([rooms(), *given]).encode()).hexdigest()[:8]


def result_of(pipeline: Path) -> dict[str, Any]:
    """The figures of a pipeline, and `logged`: the mean over the iterations of PPO of what is logged in each."""
    result: dict[str, Any] = json.loads((pipeline / "result.json").read_text(encoding="utf-8"))
    return result | {"logged": logged_means(pipeline / "ppo" / "metrics.csv", [EXPLAINED])}


def logged_means(metrics: Path, names: list[str]) -> dict[str, float]:
    """The mean of each metric over the iterations that have it."""
    rows = read_table(metrics).values()
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def ended(parent: Path, name: str) -> Iterator[Path]:
    """The result.json of each run of that name that has ended; a repeated one is NAME_run-2."""
    return (path for run in (name, f"{name}_run-*") for path in parent.glob(f"{run}/result.json"))


def newest_result(parent: Path, name: str) -> Path:
    """The last of `ended`."""
    return max(ended(parent, name), key=lambda path: path.stat().st_mtime)


def cell(result: dict[str, Any], group: str | None, name: str) -> str:
    """A figure with its interval, or a dash if the experiment does not have it."""
    figures = result if group is None else result.get(group, {})
    if name not in figures:
        return "-"
    interval = figures.get("interval", {}).get(name) if group else None
    value = f"{figures[name]:.0f}" if group is None else f"{figures[name]:.3f}"
    return f"{value} ({interval[0]:.3f} to {interval[1]:.3f})" if interval else value


def table(results: dict[int, dict[str, Any]]) -> str:
    """Markdown: one row per figure, one column per seed."""
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in results) + " |", "|---" * (len(results) + 1) + "|"]
    for title, group, name in ROWS:
        cells = [cell(result, group, name) for result in results.values()]
        if any(text != "-" for text in cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--name", help="name of the result files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("overrides", nargs="*", help="further overrides of the pipeline, after --")
    arguments = parser.parse_intermixed_args()
    name = arguments.name or arguments.experiment
    folders = {seed: run(arguments.experiment, name, seed, arguments.overrides) for seed in arguments.seeds}
    results = {seed: result_of(folder) for seed, folder in folders.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
