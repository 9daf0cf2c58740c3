"""From measurements to the table and the page."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.compare.contenders import CONTENDERS, ON_GPU, Contender
from benchmarks.compare.limit import FORMULA, decoded_bytes, flops
from benchmarks.compare.rate import SIZE
from benchmarks.compare.workload import PHASES, Workload

BASIS = "trl_lora"
COLUMNS = (
    "contender", "{0} s / iteration", "wall s", "rollout / score / train ({0} s)", "peak {1} (GiB)",
    "{0} s / TRL LoRA's", "peak / TRL LoRA's", "{0} s / limit", "response tokens / s", "in the rollout",
    "decoding's share of the bandwidth", "training's share of the best rate",
)  # fmt: skip
ABOUT = """Seconds and memory of one PPO iteration.

    python -m benchmarks.compare --trl PYTHON --device {device}

{machine}. One thread each; {versions}.

GPT-2 of {layers} layers, {heads} heads, width {width}, vocabulary 50,257, random weights; a separate reward model
of the same shape; LoRA of rank {rank} on `c_attn`. An iteration: {rows} prompts of {shortest} to {longest} tokens,
{new_tokens} response tokens for each, scoring, {epochs} epochs of {minibatches} minibatches of {minibatch} (Adam).
Every round runs a fresh process of each contender, one after the other: one iteration to warm up, one that counts.
Rounds: {rounds} of {measured} iterations, medians; on a CPU other programs may run on other cores, so its seconds are
the figure to go by. Ratios below 1 are better than TRL's LoRA row; the column of the limit says how many times the
fewest operations of that variant at the best rate of a {size}^3 matrix product an iteration takes. As a machine's speed
drifts, that is the best of many products just before and just after the process: {rates} in this run. Decoding's share:
the weights, keys and values that it must read, at the best rate of a copy then ({bandwidth}), over the seconds of
the rollout. The JSON file beside this page has the operations by phase and role.
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
- This project's reward model reads text that is decoded and tokenized again, with an end token appended; TRL's
  reads ids.
- Responses are drawn for all prompts at once in both programs; TRL also scores them at once, this project half of them
  at a time.
- This project's time includes its callbacks and log; the peak includes loading and is that of the process.
- In bfloat16 the base is held in bfloat16, adapters and the separate reward model in float32; TRL on a GPU holds all
  weights in bfloat16.
"""


def total(iteration: dict[str, Any], clock: str) -> float:
    """Seconds of all phases."""
    return float(sum(iteration[clock].values()))


def summary(
    rounds: dict[str, list[dict[str, Any]]], count: int, versions: dict[str, dict[str, str]], workload: Workload
) -> dict[str, Any]:
    """Medians, limits and ratios beside all that was measured; `rounds` are the iterations of each contender."""
    rows = {c.name: row(c, rounds[c.name], workload) for c in contenders(workload) if c.name in rounds}
    if BASIS in rows:
        for own in rows.values():
            own["ratio"] = own["seconds"] / rows[BASIS]["seconds"]
            own["peak_ratio"] = own["peak_gib"] / rows[BASIS]["peak_gib"]
    return {
        "machine": machine(workload.device), "workload": asdict(workload), "prompt_lengths": workload.prompt_lengths,
        "flops_formula": FORMULA, "contenders": rows, "rounds": count, "iterations": rounds, "versions": versions,
    }  # fmt: skip


def contenders(workload: Workload) -> tuple[Contender, ...]:
    """Who is compared on that device."""
    return ON_GPU if workload.device == "cuda" else CONTENDERS


def row(contender: Contender, iterations: list[dict[str, Any]], workload: Workload) -> dict[str, Any]:
    """One contender's; each iteration is held against the rates next to it."""
    clock, kind = workload.clock, contender.dtype
    median = {
        name: {phase: statistics.median(i[name][phase] for i in iterations) for phase in PHASES}
        for name in ("cpu", "wall")
    }
    seconds = statistics.median(total(i, clock) for i in iterations)
    counted = flops(contender, workload)
    operations = {phase: sum(roles.values()) for phase, roles in counted.items()}
    possible = {phase: statistics.median(i[clock][phase] * i["rates"][kind] for i in iterations) for phase in PHASES}
    readable = statistics.median(i[clock]["rollout"] * i["rates"]["bandwidth"] for i in iterations)
    tokens = workload.rows * workload.new_tokens
    return {
        "title": contender.title, "dtype": kind, "clock": clock, "seconds": seconds,
        "wall_seconds": statistics.median(total(i, "wall") for i in iterations), "phases": median,
        "peak_gib": statistics.median(i["peak_gib"] for i in iterations), "flops": counted,
        "ratio_to_limit": statistics.median(total(i, clock) * i["rates"][kind] for i in iterations)
        / sum(operations.values()),
        "phase_ratio_to_limit": {phase: possible[phase] / n for phase, n in operations.items()},
        "tokens_per_second": tokens / seconds, "rollout_tokens_per_second": tokens / median[clock]["rollout"],
        "decode_bandwidth_share": decoded_bytes(contender, workload) / readable,
        "train_rate_share": operations["train"] / possible["train"],
    }  # fmt: skip


def cells(own: dict[str, Any]) -> list[str]:
    """One row of the table."""
    return [
        own["title"], f"{own['seconds']:.2f}", f"{own['wall_seconds']:.2f}",
        " / ".join(f"{own['phases'][own['clock']][phase]:.2f}" for phase in PHASES), f"{own['peak_gib']:.2f}",
        *(f"{own[key]:.3f}" if key in own else "not measured" for key in ("ratio", "peak_ratio")),
        f"{own['ratio_to_limit']:.2f}", f"{own['tokens_per_second']:.1f}",
        f"{own['rollout_tokens_per_second']:.1f}", f"{own['decode_bandwidth_share']:.2f}",
        f"{own['train_rate_share']:.2f}",
    ]  # fmt: skip


def machine(device: str) -> str:
    """The GPU, or CPU, cores, memory."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {platform.system()}, Python {platform.python_version()}"
    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    name = named[0].partition(":")[2].strip() if named else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


def write(result: dict[str, Any], workload: Workload, folder: Path) -> Table:
    """compare.json and compare.md, or compare_gpu_WIDTH.* on a GPU; returns the table."""
    on_gpu = workload.device == "cuda"
    name = f"compare_gpu_{workload.width}" if on_gpu else "compare"
    columns = [column.format(*(("wall", "of the GPU") if on_gpu else ("CPU", "RSS"))) for column in COLUMNS]
    rows = [cells(own) for own in result["contenders"].values()]
    table = Table(*columns, title="one PPO iteration" + ("" if BASIS in result["contenders"] else "; TRL not measured"))
    for own in rows:
        table.add_row(*own)
    lines = ["| " + " | ".join(row) + " |" for row in [columns, *rows]]
    lines.insert(1, "|---" * len(columns) + "|")
    missing = [] if any(name.startswith("trl") for name in result["contenders"]) else ["", "TRL was not measured."]
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = ["# Beside TRL", "", about(result, workload), *lines, *missing, NOTES]
    (folder / f"{name}.md").write_text("\n".join(page), encoding="utf-8")
    return table


def about(result: dict[str, Any], workload: Workload) -> str:
    """What was measured, and how."""
    versions = "; ".join(
        f"{who}: " + ", ".join(f"{k} {v}" for k, v in of.items()) for who, of in result["versions"].items()
    )
    measured = [iteration["rates"] for own in result["iterations"].values() for iteration in own]

    def span(kind: str, unit: str) -> str:
        found = [rates[kind] / 1e9 for rates in measured]
        return f"{min(found):.0f} to {max(found):.0f} {unit}"

    return ABOUT.format(
        **asdict(workload), heads=workload.heads, minibatches=workload.rows // workload.minibatch,
        machine=result["machine"], versions=versions, rounds=result["rounds"], measured=workload.iterations - 1,
        rates=", ".join(f"{kind} {span(kind, 'GFLOP/s')}" for kind in ("float32", "bfloat16")),
        size=SIZE[workload.device], bandwidth=span("bandwidth", "GB/s"),
    )  # fmt: skip
