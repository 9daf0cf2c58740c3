"""Profile one PPO iteration by phase and kind of operation, for the workload of `benchmarks.compare`.

    python -m benchmarks.profile

One process per variant, one thread; the second iteration is measured. Seconds are the self times of PyTorch's profiler:
those of an operator without the operators that it calls. "Outside of operators" is the rest of the wall clock: Python,
dispatch, the profiler. The limit is the time that the operations counted in `benchmarks/compare/limit.py` would need at
the best rate of a 1024^3 matrix product. Writes benchmarks/results/profile.json and profile.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile

from benchmarks.compare.__main__ import lines
from benchmarks.compare.contenders import CONTENDERS, Contender
from benchmarks.compare.limit import flops
from benchmarks.compare.ours import PhaseClock
from benchmarks.compare.rate import best
from benchmarks.compare.workload import PHASES, Workload

RESULTS = Path(__file__).parent / "results"
CLOCK = "+callbacks.clock._target_"
VARIANTS = ("ours_lora", "ours_lora_bf16", "ours_top_bf16", "ours_full")
ATTENTION, ACTIVATION = "attention", "activation"
WITHIN = {"_ShortRows": ATTENTION}  # an autograd function whose operators are all of one kind
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear_pointwise", "linear", "matmul", "einsum", "vecdot"),
    ATTENTION: ("scaled_dot_product", "softmax"),
    ACTIVATION: ("gelu",),
    "vocabulary: exp, max, log": ("exp", "amax", "log"),
    "norms": ("native_layer_norm",),
    "copies, casts, indexing": ("copy", "cat", "clone", "index", "gather", "scatter", "slice", "select"),
}
OTHER, OUTSIDE, LIMIT = "other operators", "outside of operators", "limit of the matrix products"


def kind_of(event: FunctionEvent) -> str:
    """The row of an operator, by its own name or by the function that called it."""
    node: FunctionEvent | None = event
    while node is not None:
        for function, kind in WITHIN.items():
            if node.name.startswith(function):
                return kind
        node = node.cpu_parent
    name = event.name.rpartition("::")[2].lstrip("_")
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), OTHER)


class Profile:
    """A clock that records the seconds of each kind of operation; the first iteration warms up."""

    def __init__(self, _: str) -> None:
        self.steps, self.found, self.profiler = 0, {}, None

    def lap(self, phase: str) -> None:
        """Assign everything since the last lap to `phase`."""
        if self.profiler is None:
            return
        wall = time.perf_counter() - self.since
        self.profiler.__exit__(None, None, None)
        seconds: Counter[str] = Counter()
        for event in self.profiler.events():
            seconds[kind_of(event)] += event.self_cpu_time_total / 1e6
        self.found[phase] = dict(seconds) | {OUTSIDE: max(0.0, wall - seconds.total())}
        self._begin()

    def finish(self, response_tokens: int) -> None:
        """End the iteration: print it, or start to record after the warm-up."""
        if self.profiler is None:
            self._begin()
            return
        self.profiler.__exit__(None, None, None)
        self.profiler = None
        print(json.dumps(self.found), flush=True)

    def _begin(self) -> None:
        self.profiler = profile()
        self.profiler.__enter__()
        self.since = time.perf_counter()


class PhaseProfile(PhaseClock):
    """The hooks of `PhaseClock` with this clock."""

    make_clock = Profile


def profiled(contender: Contender, workload: Workload, folder: Path) -> dict[str, dict[str, float]]:
    """phase -> kind -> seconds, from a separate process."""
    settings = contender.settings.replace("TOP", str(workload.top)).split()
    command = ["-m", "benchmarks.compare.ours", str(folder), *settings, f"{CLOCK}=benchmarks.profile.PhaseProfile"]
    return json.loads([line for line in lines(sys.executable, *command) if line.startswith('{"rollout"')][-1])


def section(contender: Contender, phases: dict[str, dict[str, float]], limits: dict[str, float]) -> list[str]:
    """One variant's table in Markdown."""
    totals = {phase: sum(kinds.values()) for phase, kinds in phases.items()}
    head = [contender.title, *(f"{phase} (s)" for phase in PHASES), "share of all"]
    rows = [head, ["---"] * len(head)]
    for kind in (*KINDS, OTHER, OUTSIDE):
        seconds = [phases[phase].get(kind, 0.0) for phase in PHASES]
        rows.append([kind, *(f"{s:.2f}" for s in seconds), f"{sum(seconds) / sum(totals.values()):.3f}"])
    rows.append(["all", *(f"{totals[phase]:.2f}" for phase in PHASES), "1"])
    share = sum(limits.values()) / sum(totals.values())
    rows.append([LIMIT, *(f"{limits[phase]:.2f}" for phase in PHASES), f"{share:.3f}"])
    return ["| " + " | ".join(row) + " |" for row in rows]


def main() -> None:
    """Entry of the command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    workload = Workload(layers=12, width=768)
    rates = {name: max(best(getattr(torch, name)).values()) for name in ("float32", "bfloat16")}
    found: dict[str, Any] = {"rates": rates, "seconds": {}, "limits": {}}
    page: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write(folder)
        lines(sys.executable, "-m", "benchmarks.compare.files", name)
        for contender in [c for c in CONTENDERS if c.name in VARIANTS]:
            counted = {phase: sum(roles.values()) for phase, roles in flops(contender, workload).items()}
            limits = {phase: operations / rates[contender.dtype] for phase, operations in counted.items()}
            phases = profiled(contender, workload, folder)
            found["seconds"][contender.name], found["limits"][contender.name] = phases, limits
            page += [*section(contender, phases, limits), ""]
            print("\n".join(page[-len(KINDS) - 7 :]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "profile.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "profile.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
