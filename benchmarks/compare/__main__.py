"""Seconds and memory of one PPO iteration: this project and TRL 1.12, for GPT-2 shapes with random weights.

    python -m benchmarks.compare --trl PYTHON                  124M on a CPU, one thread
    python -m benchmarks.compare --trl PYTHON --device cuda    124M and 1B in bfloat16 on a GPU

PYTHON is the interpreter of an environment with TRL, made for example by

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.12.0 peft

Without --trl only this project is measured, and the table says so. An iteration is the rollout of 16 responses of 48
tokens (on a GPU 64 of 256), their scoring by a reward model of the policy's shape, and 4 epochs of 4 minibatches
(Adam). In each round every contender runs in a new process: one iteration to warm up, then one that is measured (on a
GPU three). Medians. Writes benchmarks/results/compare.json and compare.md, on a GPU compare_gpu_WIDTH.*.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare.contenders import CONTENDERS, ON_GPU, Contender
from benchmarks.compare.page import contenders, summary, write
from benchmarks.compare.workload import Workload, on_gpu

WIDE = 160  # width of the table in characters
ROOT = Path(__file__).parents[2]
SHAPES = {"cpu": [Workload(12, 768)], "cuda": [on_gpu(12, 768), on_gpu(24, 1792)]}
ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **{"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def lines(python: str, *arguments: str, device: str = "cpu") -> list[str]:
    """The lines that a Python process prints; its errors go to the terminal."""
    env = ENVIRONMENT if device == "cuda" else ENVIRONMENT | NO_GPU
    done = subprocess.run([python, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    return done.stdout.splitlines()


def run(contender: Contender, python: str, workload: Workload, folder: Path) -> list[dict[str, Any]]:
    """The iterations of one process, without the first. Raises `ValueError` if it did other work than asked."""
    module = "benchmarks.compare.by_trl" if contender.trl else "benchmarks.compare.ours"
    settings = contender.settings.replace("TOP", str(workload.top)).split()
    printed = lines(python, "-m", module, str(folder), *settings, device=workload.device)
    found = [json.loads(line) for line in printed if line.startswith('{"wall"')]
    steps = workload.steps * (1 if contender.trl else 2)  # TRL: one optimizer for both models
    for iteration in found:
        done = iteration["response_tokens"], iteration["optimizer_steps"]
        if done != (workload.rows * workload.new_tokens, steps):
            raise ValueError(f"{contender.name}: response tokens and optimizer steps were {done}")
    if len(found) != workload.iterations:
        raise ValueError(f"{contender.name}: {len(found)} iterations were measured, not {workload.iterations}")
    return found[1:]


def versions(python: str, *names: str) -> dict[str, str]:
    """Versions of libraries in an environment."""
    code = "import json, sys; from importlib.metadata import version; print(json.dumps([*map(version, sys.argv[1:])]))"
    return dict(zip(names, json.loads(lines(python, "-c", code, *names)[-1]), strict=True))


def measure(arguments: argparse.Namespace, workload: Workload, folder: Path) -> Table:
    """Run all rounds, with the best rates just before or after each process; results are written after every round."""
    pythons = {False: sys.executable, True: arguments.trl}
    chosen = [c for c in contenders(workload) if pythons[c.trl] and (not arguments.only or c.name in arguments.only)]
    names = ("torch", "transformers", "peft")
    used = {"ours": versions(sys.executable, *names, "lightning")}
    if arguments.trl:
        used["TRL"] = versions(arguments.trl, *names, "trl")
    rounds: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in chosen}
    before = _rates(workload.device)
    for number in range(arguments.rounds):
        for contender in chosen:
            iterations = run(contender, pythons[contender.trl], workload, folder)
            after = _rates(workload.device)
            near = {kind: max(before[kind], rate) for kind, rate in after.items()}
            rounds[contender.name] += [iteration | {"rates": near} for iteration in iterations]
            seconds, before = sum(iterations[-1][workload.clock].values()), after
            print(f"round {number + 1}: {contender.name} {seconds:.1f} s", file=sys.stderr, flush=True)
        table = write(summary(rounds, number + 1, used, workload), workload, arguments.results)
    return table


def _rates(device: str) -> dict[str, float]:
    """The machine's best rates now, of a GPU those at the start: operations per second by precision, and bytes."""
    return _rates_at_start(device) if device == "cuda" else _measured_rates(device)


def _measured_rates(device: str) -> dict[str, float]:
    found = json.loads(lines(sys.executable, "-m", "benchmarks.compare.rate", device, device=device)[-1])
    return {kind: max(ways.values()) for kind, ways in found.items()}


@cache
def _rates_at_start(device: str) -> dict[str, float]:
    return _measured_rates(device)


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of the environment that has TRL")
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--rounds", type=int, choices=range(1, 100), metavar="N", help="3, on a GPU 1")
    parser.add_argument("--only", nargs="+", choices=sorted({c.name for c in CONTENDERS + ON_GPU}), metavar="NAME")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.device == "cuda" else 3)
    for workload in SHAPES[arguments.device]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            workload.write(folder)
            lines(sys.executable, "-m", "benchmarks.compare.files", name, device=workload.device)
            table = measure(arguments, workload, folder)
        Console(width=max(WIDE, Console().width)).print(table)


if __name__ == "__main__":
    main()
