"""Seconds and memory of one PPO iteration: this project beside TRL 1.12, for GPT-2 small with random weights on a CPU.

    python -m benchmarks.compare --trl PYTHON

PYTHON is the interpreter of an environment that has TRL; made, for example, by

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.12.0 peft

Without it only this project is measured, and the table says so. An iteration is the rollout of 16 responses of 48
tokens, their scoring by a reward model of the policy's shape, and 4 epochs of 4 minibatches (Adam). In each round
every contender runs one fresh process with one thread: an iteration to warm up and one that counts. Medians over the
rounds. Writes benchmarks/results/compare.json and compare.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare.contenders import CONTENDERS, Contender
from benchmarks.compare.page import summary, write
from benchmarks.compare.workload import Workload

WIDE = 160  # characters that the table takes
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **{"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
}


def lines(python: str, *arguments: str) -> list[str]:
    """What a Python prints; its errors go to the screen."""
    done = subprocess.run(
        [python, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    return done.stdout.splitlines()


def run(contender: Contender, python: str, workload: Workload, folder: Path) -> dict[str, Any]:
    """The last iteration of one process. Raises `ValueError` when it did other work than was asked for."""
    module = "benchmarks.compare.by_trl" if contender.trl else "benchmarks.compare.ours"
    settings = contender.settings.replace("TOP", str(workload.top)).split()
    printed = lines(python, "-m", module, str(folder), *settings)
    found = [json.loads(line) for line in printed if line.startswith('{"wall"')]
    steps = workload.steps * (1 if contender.trl else 2)  # TRL: one optimizer for both models
    for iteration in found:
        done = iteration["response_tokens"], iteration["optimizer_steps"]
        if done != (workload.rows * workload.new_tokens, steps):
            raise ValueError(f"{contender.name}: response tokens and optimizer steps were {done}")
    if len(found) != workload.iterations:
        raise ValueError(f"{contender.name}: {len(found)} iterations were measured, not {workload.iterations}")
    return found[-1]


def versions(python: str, *names: str) -> dict[str, str]:
    """Of libraries in an environment."""
    code = "import json, sys; from importlib.metadata import version; print(json.dumps([*map(version, sys.argv[1:])]))"
    return dict(zip(names, json.loads(lines(python, "-c", code, *names)[-1]), strict=True))


def measure(arguments: argparse.Namespace, workload: Workload, folder: Path) -> Table:
    """All rounds, and the fastest matrix product of each; what there is is written after every round."""
    pythons = {False: sys.executable, True: arguments.trl}
    chosen = [c for c in CONTENDERS if pythons[c.trl] and (not arguments.only or c.name in arguments.only)]
    names = ("torch", "transformers", "peft")
    used = {"ours": versions(sys.executable, *names, "lightning")}
    if arguments.trl:
        used["TRL"] = versions(arguments.trl, *names, "trl")
    rounds: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in chosen}
    found: dict[str, Any] = {"rounds": rounds, "rates": [], "versions": used}
    for number in range(arguments.rounds):
        found["rates"].append(json.loads(lines(sys.executable, "-m", "benchmarks.compare.rate")[-1]))
        for contender in chosen:
            rounds[contender.name].append(run(contender, pythons[contender.trl], workload, folder))
            cpu = sum(rounds[contender.name][-1]["cpu"].values())
            print(f"round {number + 1}: {contender.name} {cpu:.1f} s", file=sys.stderr, flush=True)
        table = write(summary(found, workload), workload, arguments.results)
    return table


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of the environment that has TRL")
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 100), metavar="N")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--only", nargs="+", choices=[c.name for c in CONTENDERS], help="these contenders")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", metavar="FOLDER")
    arguments = parser.parse_args()
    workload = Workload(arguments.layers, arguments.width)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write(folder)
        lines(sys.executable, "-m", "benchmarks.compare.files", name)
        table = measure(arguments, workload, folder)
    Console(width=max(WIDE, Console().width)).print(table)


if __name__ == "__main__":
    main()
