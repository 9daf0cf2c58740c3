"""Overoptimize a weak reward model, with and without early_stop=gold, with several seeds.

    python -m benchmarks.overoptimization --seeds 1 2 3

Runs the pipeline of experiment=overoptimization, then its PPO stage again with early_stop=gold, from the same SFT and
reward model. Writes benchmarks/results/overoptimization.{md,json} and docs/overoptimization.png, the plot of the first
seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.seeds import RESULTS, newest_result
from src.callbacks.gold import fit_of, gold_rows
from src.loggers.csv import read_table

WINDOW = 5  # iterations, as in conf/early_stop/gold.yaml
ROWS = {
    "reward model: clear pairs ordered correctly": "accuracy",
    "... of n pairs": "accuracy_n",
    "... 95% interval, from": "accuracy_low",
    "... to": "accuracy_high",
    "gold at the start": "start",
    "gold, highest window": "highest",
    "... at iteration": "highest_at",
    "gold, last window": "last",
    "score, highest gold window": "score_there",
    "score, last window": "score_last",
    "alpha": "alpha",
    "beta": "beta",
    "turning point of the fit (sqrt nats)": "turn",
    "KL, last window (nats per sequence)": "kl_last",
    "with early stop: stopped after iteration": "stopped_after",
    "with early stop: gold of the policy kept, held-out prompts": "kept",
    "start + 0.9 (highest - start)": "wanted",
}


def run(module: str, folder: Path, *overrides: str) -> Path:
    """Run a command of src into a new run folder of that name, NAME_run-2 if there is one; returns it."""
    name = [f"log_dir={folder.parents[1]}", f"name={folder.name}", "experiment=overoptimization", "resume=never"]
    subprocess.run([sys.executable, "-m", module, *name, *overrides], check=True)
    return newest_result(folder.parent, folder.name).parent


def windows(rows: list[list[float]]) -> list[list[float]]:
    """Means of [score, gold, KL] over every `WINDOW` iterations."""
    starts = range(0, len(rows) - WINDOW + 1, WINDOW)
    return [[sum(column) / WINDOW for column in zip(*rows[i : i + WINDOW], strict=True)] for i in starts]


def study(seed: int) -> dict[str, Any]:
    """The figures of both runs of a seed."""
    logs = Path("logs").resolve()
    free = run("src.pipeline", logs / "pipeline" / f"overoptimization-{seed}", f"seed={seed}")
    models = [f"model.path={free / 'sft' / 'model'}", f"reward.path={free / 'reward' / 'model'}"]
    kept = run("src.train", logs / "ppo" / f"overoptimization-{seed}", f"seed={seed}", "early_stop=gold", *models)
    rows = gold_rows(free / "ppo")
    means = windows(rows)
    top = max(range(len(means)), key=lambda i: means[i][1])
    alpha, beta, turn = fit_of(rows)
    start, highest = rows[0][1], means[top][1]
    result, stopped = (json.loads((folder / "result.json").read_text()) for folder in (free, kept))
    right = result["reward_model"]
    low, high = right["interval"]["accuracy"]
    return {
        "accuracy": right["accuracy"], "accuracy_n": right["n"]["accuracy"], "accuracy_low": low, "accuracy_high": high,
        "start": start, "highest": highest,
        "highest_at": (top + 1) * WINDOW, "last": means[-1][1], "score_there": means[top][0],
        "score_last": means[-1][0],
        "alpha": alpha, "beta": beta, "turn": turn, "kl_last": means[-1][2],
        "stopped_after": max(read_table(kept / "metrics.csv")), "kept": stopped["ppo"]["gold"],
        "wanted": start + 0.9 * (highest - start), "plot": str(free / "ppo" / "gold.png"),
    }  # fmt: skip


def table(found: dict[int, dict[str, Any]]) -> str:
    """Markdown: one row per figure, one column per seed."""
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in found) + " |", "|---" * (len(found) + 1) + "|"]
    for title, name in ROWS.items():
        values = [figures[name] for figures in found.values()]
        cells = ["-" if v is None else str(v) if isinstance(v, int) else f"{v:.3f}" for v in values]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    found = {seed: study(seed) for seed in parser.parse_args().seeds}
    shutil.copy(next(iter(found.values()))["plot"], Path("docs/overoptimization.png"))
    for figures in found.values():
        del figures["plot"]
    (RESULTS / "overoptimization.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "overoptimization.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
