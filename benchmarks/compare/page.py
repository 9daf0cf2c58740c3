"""From measurements to the table and the page."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.compare.contenders import CONTENDERS, Contender
from benchmarks.compare.limit import FORMULA, flops
from benchmarks.compare.workload import PHASES, Workload

BASIS = "trl_lora"
COLUMNS = (
    "contender", "CPU s / iteration", "wall s", "rollout / score / train (CPU s)", "peak RSS (GiB)",
    "CPU s / TRL LoRA's", "peak / TRL LoRA's", "CPU s / limit", "response tokens / s", "in the rollout",
)  # fmt: skip
ABOUT = """Seconds and memory of one PPO iteration. Made by `python -m benchmarks.compare --trl PYTHON`.

{machine}. One thread each; {versions}.

GPT-2 of {layers} layers, {heads} heads, width {width}, vocabulary 50,257, random weights; a separate reward model
of the same shape; LoRA of rank {rank} on `c_attn`. An iteration: {rows} prompts of {shortest} to {longest} tokens,
{new_tokens} response tokens for each, scoring, {epochs} epochs of {minibatches} minibatches of {minibatch} (Adam).
Every round runs a fresh process of each contender, one after the other: one iteration to warm up, one that counts.
Rounds: {rounds}, medians; other programs ran on the machine's other core, so the CPU seconds are the figure to go
by. Ratios below 1 are better than TRL's LoRA row; the column of the limit says how many times the fewest operations
of that variant at the best measured rate of a 1024^3 matrix product ({rates}) an iteration takes; `compare.json`
has the operations by phase and role.
"""
NOTES = """
What is alike: the weights, the prompts, the number of response tokens, the optimizer steps of each model (counted). No
response ends early in either program: the last hidden state has one constant coordinate, at which the embeddings of the
special tokens are -100, so none of them is ever drawn; the tokens are counted in every iteration.

What is not comparable:

- TRL has no LoRA critic: in its LoRA row the value model is a whole model, trained in full, with one optimizer for
  both.
- TRL's update pads every row to the longest prompt and runs the vocabulary head on all positions; this project
  trims each minibatch and runs the head on response tokens. The limit counts real tokens and response positions for
  both.
- TRL takes the old log-probabilities from the sampler; this project computes them again by the path that trains.
- This project's reward model reads text that is decoded and tokenised again, with an end token appended; TRL's
  reads ids.
- This project's time includes its callbacks and log; the peak includes loading and is that of the process.
- In bfloat16 the base is held in bfloat16, adapters and the separate reward model in float32.
"""


def total(iteration: dict[str, Any], clock: str) -> float:
    """Seconds of all phases."""
    return float(sum(iteration[clock].values()))


def summary(found: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """Medians, limits and ratios beside all that was measured."""
    best = {dtype: max(max(r[dtype].values()) for r in found["rates"]) for dtype in ("float32", "bfloat16")}
    rows = {
        c.name: row(c, found["rounds"][c.name], best[c.dtype], workload)
        for c in CONTENDERS
        if c.name in found["rounds"]
    }
    if BASIS in rows:
        for own in rows.values():
            own["cpu_ratio"] = own["cpu_seconds"] / rows[BASIS]["cpu_seconds"]
            own["peak_ratio"] = own["peak_gib"] / rows[BASIS]["peak_gib"]
    return {
        "machine": machine(), "workload": asdict(workload), "prompt_lengths": workload.prompt_lengths,
        "best_rate": best, "flops_formula": FORMULA, "contenders": rows, **found,
    }  # fmt: skip


def row(contender: Contender, rounds: list[dict[str, Any]], rate: float, workload: Workload) -> dict[str, Any]:
    """One contender's."""
    median = {
        clock: {phase: statistics.median(r[clock][phase] for r in rounds) for phase in PHASES}
        for clock in ("cpu", "wall")
    }
    cpu = statistics.median(total(r, "cpu") for r in rounds)
    counted = flops(contender, workload)
    operations = {phase: sum(roles.values()) for phase, roles in counted.items()}
    tokens = workload.rows * workload.new_tokens
    return {
        "title": contender.title, "dtype": contender.dtype, "cpu_seconds": cpu,
        "wall_seconds": statistics.median(total(r, "wall") for r in rounds), "phases": median,
        "peak_gib": statistics.median(r["peak_gib"] for r in rounds), "flops": counted,
        "limit_seconds": {phase: n / rate for phase, n in operations.items()},
        "ratio_to_limit": cpu / (sum(operations.values()) / rate),
        "phase_ratio_to_limit": {phase: median["cpu"][phase] / (n / rate) for phase, n in operations.items()},
        "tokens_per_cpu_second": tokens / cpu, "rollout_tokens_per_cpu_second": tokens / median["cpu"]["rollout"],
    }  # fmt: skip


def cells(own: dict[str, Any]) -> list[str]:
    """One row of the table."""
    return [
        own["title"], f"{own['cpu_seconds']:.2f}", f"{own['wall_seconds']:.2f}",
        " / ".join(f"{own['phases']['cpu'][phase]:.2f}" for phase in PHASES), f"{own['peak_gib']:.2f}",
        *(f"{own[key]:.3f}" if key in own else "not measured" for key in ("cpu_ratio", "peak_ratio")),
        f"{own['ratio_to_limit']:.2f}", f"{own['tokens_per_cpu_second']:.1f}",
        f"{own['rollout_tokens_per_cpu_second']:.1f}",
    ]  # fmt: skip


def machine() -> str:
    """CPU, cores, memory."""
    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    name = named[0].partition(":")[2].strip() if named else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


def write(result: dict[str, Any], workload: Workload, folder: Path) -> Table:
    """compare.json and compare.md; returns the table."""
    rows = [cells(own) for own in result["contenders"].values()]
    table = Table(*COLUMNS, title="one PPO iteration" + ("" if BASIS in result["contenders"] else "; TRL not measured"))
    for own in rows:
        table.add_row(*own)
    versions = "; ".join(
        f"{who}: " + ", ".join(f"{k} {v}" for k, v in of.items()) for who, of in result["versions"].items()
    )
    about = ABOUT.format(
        **asdict(workload), heads=workload.heads, minibatches=workload.rows // workload.minibatch,
        machine=result["machine"], versions=versions, rounds=len(result["rates"]),
        rates=", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in result["best_rate"].items()),
    )  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in [list(COLUMNS), *rows]]
    lines.insert(1, "|---" * len(COLUMNS) + "|")
    missing = [] if any(name.startswith("trl") for name in result["contenders"]) else ["", "TRL was not measured."]
    folder.mkdir(exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(
        "\n".join(["# Beside TRL", "", about, *lines, *missing, NOTES]), encoding="utf-8"
    )
    return table
