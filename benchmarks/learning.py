"""Train with every advantage estimator and PPO-clip, and with every policy loss and GAE, on the embedded task.

    python -m benchmarks.learning --seeds 1 2 3

All runs share one SFT policy and one reward model; each prompt gets four responses, as group estimators need. Writes
benchmarks/results/learning.json (every figure of every run) and learning.md (the table).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.seeds import newest_result
from src.config import files
from src.loggers.csv import read_table
from src.utils.statistics import Figure

RESULTS = Path(__file__).parent / "results"
SHARED = ("rollout.samples_per_prompt=4", "ppo.num_iterations=25", "ppo.eval_prompts=256", "resume=never")
DEFAULT = {"advantage": "gae", "policy_loss": "clip"}
EXTRA = {"gspo": ["aggregation=sequence_mean"]}
# they differ by a constant and a factor for all tokens of a batch, which whitening takes away: one algorithm, one row
EQUAL = {"reward_to_go": ("baseline_batch", "baseline_running", "reinforce_pp")}


def options(group: str) -> list[str]:
    """The options of a group, the default first, one of those that are equal under whitening."""
    repeated = {name for others in EQUAL.values() for name in others}
    names = [name for name in files.options(group) if name not in repeated]
    return [DEFAULT[group], *(name for name in names if name != DEFAULT[group])]


def run(group: str, option: str, seed: int, log_dir: str) -> dict[str, Any]:
    """One training run in a separate process; returns its result.json."""
    name = f"learning-{group}-{option}-{seed}"
    overrides = [f"{group}={option}", *EXTRA.get(option, []), *SHARED, f"seed={seed}", f"name={name}"]
    command = [sys.executable, "-m", "src.train", *overrides, f"log_dir={log_dir}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    newest = newest_result(Path(log_dir, "ppo"), name)
    rows = read_table(newest.parent / "metrics.csv").values()
    training = {"training_gold": statistics.mean(row["rollout/gold"] for row in rows)}
    return json.loads(newest.read_text(encoding="utf-8")) | training


def table(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """One row per choice: gold during training (how fast it learns), gold after it for each seed, and the KL."""
    seeds = list(next(iter(results.values())))
    held_out = " | ".join(f"gold after, seed {seed}" for seed in seeds)
    lines = [f"| choice | gold over the iterations | {held_out} | KL (nats) |", "|---" * (len(seeds) + 3) + "|"]
    for choice, by_seed in results.items():
        speed = ", ".join(f"{result['training_gold']:.2f}" for result in by_seed.values())
        kl = statistics.mean(result["ppo"]["kl"] for result in by_seed.values())
        after = " | ".join(with_interval(result["ppo"], "gold") for result in by_seed.values())
        same = "".join(f", {name}" for name in EQUAL.get(choice.partition("=")[2], ()))
        lines.append(f"| {choice}{same} | {speed} | {after} | {kl:.1f} |")
    return "\n".join(lines)


def with_interval(figures: dict[str, Any], name: str) -> str:
    """A figure of a result.json and its 95% interval."""
    low, high = figures["interval"][name]
    return f"{Figure(figures[name], figures['n'][name], (low, high)):.2f}"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--log-dir", default="logs")
    arguments = parser.parse_args()
    jobs = [(g, o, s) for g in DEFAULT for o in options(g) for s in arguments.seeds]
    # the default pair is the same run in both groups
    jobs = [job for job in jobs if job[:2] != ("policy_loss", DEFAULT["policy_loss"])]
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for group, option, seed in track(jobs, description="runs"):
        results.setdefault(f"{group}={option}", {})[seed] = run(group, option, seed, arguments.log_dir)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "learning.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "learning.md").write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))
    print(f"{RESULTS}: learning.md, learning.json")


if __name__ == "__main__":
    main()
