"""The table and the page, from the measurements."""

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
from benchmarks.provenance import processor

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
In every round each contender runs in a new process: one iteration to warm up, then the measured ones. Rounds: {rounds}
of {measured} measured iterations, medians. Other programs may run on other cores, so CPU seconds are compared on a CPU.
Ratios below 1 are better than TRL's LoRA row. "s / limit" divides the seconds by those that the least operations of the
variant need at the best rate of a {size}^3 matrix product; the rate is measured just before and after each process, as
a machine's speed drifts: {rates} in this run. Decoding's share: the seconds to read weights, keys and values once per
token at the best rate of a copy ({bandwidth}), divided by the seconds of the rollout. The JSON file next to this page
has the operations by phase and role.
"""
NOTES = """
What is the same: the weights, the prompts, the number of response tokens, the optimizer steps of each model (counted).
No response ends early in either program: the last hidden state has one constant coordinate, where the embeddings of the
special tokens are -100, so none of them is ever sampled; the tokens are counted in every iteration.

What is not comparable:

- In TRL the value model is a separate model with its own base and one optimizer for both. In the LoRA row all its
  weights are trained, as TRL gives an adapter to the policy alone; in the row with two peft has wrapped it before.
- TRL's update pads every row to the longest prompt and runs the vocabulary head on all positions; this project
  trims each minibatch and runs the head on response tokens. The limit counts real tokens and response positions for
  both.
- TRL reuses the sampler's log-probabilities as the old ones; this project computes them again by the code that trains.
- This project's reward model reads text that is decoded and tokenized again, with an end token appended; TRL's
  reads ids.
- Both programs sample all prompts at once; TRL also scores all at once, this project half of them at a time.
- This project's time includes its callbacks and its log; the peak is that of the process and includes loading.
- In bfloat16 the base is in bfloat16, adapters and the separate reward model are in float32; TRL on a GPU keeps all
  weights in bfloat16.
"""


def total(iteration: dict[str, Any], clock: str) -> float:
    """Seconds of all phases."""
    return float(sum(iteration[clock].values()))


def summary(
    rounds: dict[str, list[dict[str, Any]]], count: int, versions: dict[str, dict[str, str]], workload: Workload
) -> dict[str, Any]:
    """Medians, limits and ratios, and all measurements; `rounds` are the iterations of each contender."""
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
    """The contenders on that device."""
    return ON_GPU if workload.device == "cuda" else CONTENDERS


def row(contender: Contender, iterations: list[dict[str, Any]], workload: Workload) -> dict[str, Any]:
    """The figures of one contender; each iteration is divided by the rates measured next to it."""
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
    """The GPU, or CPU, cores and memory."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {platform.system()}, Python {platform.python_version()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"
    return f"{processor()}, {os.cpu_count()} cores, {system}"


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
    page = ["# Comparison with TRL", "", about(result, workload), *lines, *missing, NOTES]
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
