"""Folders of runs as training leaves them, made up in milliseconds."""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from src.config.compose import compose

QUANTITIES = ("logprob", "ref_logprob", "kl", "reward", "value", "advantage", "ratio", "clipped")


@cache
def _config(overrides: tuple[str, ...]) -> str:
    return yaml.safe_dump(compose(list(overrides)).plain())


def metrics(iterations: int, wide: bool = False) -> dict[int, dict[str, float]]:
    """A healthy run: the score grows to 2, gold with it, the KL to 4; `wide`: with more columns."""
    rows = {}
    for step in range(1, iterations + 1):
        grown = 1 - 0.5 ** (8 * step / iterations)
        rows[step] = {"rollout/score": 2 * grown, "rollout/gold": grown, "rollout/kl": 4 * grown}
        rows[step] |= {"critic/explained_variance": grown}
        if wide:
            rows[step] |= {"rollout/score_std": 0.5, "rollout/eos_fraction": 1.0, "rollout/response_length": 16 + grown}
            rows[step] |= {"policy/clip_fraction": 0.1, "policy/ratio": 1.0, "policy/entropy": 2 - grown}
            rows[step] |= {"train/episodes": 64.0 * step, "critic/loss": 1 - grown}
    return rows


def timing(iterations: int) -> dict[int, dict[str, float]]:
    """A second of each phase, two of the policy; only the policy's memory is known."""
    seconds = {f"time/seconds_{name}": 1.0 for name in ("rollout", "reward", "scoring", "critic", "other")}
    row = seconds | {"time/seconds_policy": 2.0, "time/peak_gib_policy": 1.5, "time/memory_gib": 1.25}
    return dict.fromkeys(range(1, iterations + 1), row)


def sample(iteration: int, row: int, tokens: list[str], prompt: str = "It is a film") -> dict[str, Any]:
    """A kept sample whose numbers are its places."""
    numbers = {name: [round(0.1 * (i + 1) - 0.25, 3) for i in range(len(tokens))] for name in QUANTITIES}
    numbers["clipped"] = [float(i == 1) for i in range(len(tokens))]
    return {
        "iteration": iteration, "prompt": prompt, "response": "".join(tokens), "score": 0.5 + row, "finished": True,
        "tokens": {"text": tokens, **numbers},
    }  # fmt: skip


def answers(rows: int, before: str = " that is bad.", after: str = " that is great!") -> list[dict[str, Any]]:
    """The final comparison."""
    return [
        {
            "prompt": f"Film {row}",
            "sft": {"response": before, "score": 0.1 * row, "gold": 0.0, "kl": 0.0},
            "ppo": {"response": after, "score": 2.0 - 0.05 * row, "gold": 1.0, "kl": 4.0},
        }
        for row in range(rows)
    ]


def result(score: float = 2.0, interval: tuple[float, float] = (1.5, 2.2)) -> dict[str, Any]:
    """A result of format 2."""

    def group(**values: float) -> dict[str, Any]:
        interval = {name: [x - 0.1, x + 0.1] for name, x in values.items()}
        return {**values, "n": dict.fromkeys(values, 8), "interval": interval}

    improvement = group(score=score, gold=1.0)
    improvement["interval"]["score"] = list(interval)
    return {
        "format": 2, "stage": "ppo", "seconds": 56.3, "git_revision": "abc123", "config_hash": "0", "seed": 1,
        "sft": group(score=0.05, gold=0.0, kl=0.0), "ppo": group(score=score, gold=1.0, kl=4.0),
        "improvement": improvement,
    }  # fmt: skip


def write_run(
    folder: Path, *overrides: str, iterations: int = 40, finished: bool = True, stage: str = "ppo", **changed: Any
) -> Path:
    """A run's folder; `changed` replaces metrics, samples, comparison or result."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(_config((f"stage={stage}", *overrides)))
    write_table(folder / "metrics.csv", changed.get("metrics") or metrics(iterations))
    write_table(folder / "timing.csv", changed.get("timing") or timing(iterations))
    kept = changed.get("samples") or [
        sample(i, row, [" that", " is", " great", ".", "<eos>"]) for i in (1, iterations) for row in range(3)
    ]
    for iteration in dict.fromkeys(row["iteration"] for row in kept):
        own = [row for row in kept if row["iteration"] == iteration]
        write_lines(folder / "samples" / f"iteration-{iteration:06d}.jsonl", own)
    if finished:
        write_lines(folder / "comparison.jsonl", changed.get("comparison") or answers(9))
        (folder / "result.json").write_text(json.dumps(changed.get("result") or result()) + "\n")
    return folder


def write_table(path: Path, rows: dict[int, dict[str, float]]) -> None:
    names = list(next(iter(rows.values())))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *names])
        writer.writerows([step, *(row[name] for name in names)] for step, row in rows.items())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
