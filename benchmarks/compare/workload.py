"""What every contender does, and the clock that all of them are timed by; needs the standard library alone."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

PHASES = ("rollout", "score", "train")
VOCABULARY = 50257


@dataclass(frozen=True)
class Workload:
    """A GPT-2 shape and the sizes of one PPO iteration."""

    layers: int
    width: int
    rows: int = 16  # prompts of an iteration, one response each
    shortest: int = 16  # tokens of the shortest prompt
    longest: int = 47  # and of the longest
    new_tokens: int = 48  # tokens of every response
    epochs: int = 4
    minibatch: int = 4  # rows per optimizer step
    rank: int = 16  # of LoRA, on GPT-2's c_attn
    iterations: int = 2  # of a process; the last is measured, the others warm up

    @property
    def heads(self) -> int:
        """Of 64 numbers each, as in GPT-2."""
        return max(1, self.width // 64)

    @property
    def top(self) -> int:
        """The layers with adapters where only the highest have some: 4 of 12."""
        return max(1, self.layers // 3)

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each prompt, evenly from the shortest to the longest."""
        step = (self.longest - self.shortest) / (self.rows - 1)
        return [self.shortest + round(i * step) for i in range(self.rows)]

    @property
    def steps(self) -> int:
        """Optimizer steps of one model in an iteration."""
        return self.epochs * self.rows // self.minibatch

    def write(self, folder: Path) -> None:
        """For the contenders, as workload.json."""
        (folder / "workload.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Workload:
        """What `write` wrote."""
        return Workload(**json.loads((folder / "workload.json").read_text(encoding="utf-8")))


class Clock:
    """Wall and CPU seconds of the phases of an iteration, one JSON line for each iteration."""

    def __init__(self) -> None:
        self.wall, self.cpu = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self.steps = 0
        self.since = time.perf_counter(), time.process_time()

    def lap(self, phase: str) -> None:
        """All since the last lap was `phase`."""
        now = time.perf_counter(), time.process_time()
        self.wall[phase] += now[0] - self.since[0]
        self.cpu[phase] += now[1] - self.since[1]
        self.since = now

    def finish(self, response_tokens: int) -> None:
        """Print the iteration and begin the next. The peak is that of the whole process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        line = {"wall": self.wall, "cpu": self.cpu, "peak_gib": peak}
        print(json.dumps(line | {"response_tokens": response_tokens, "optimizer_steps": self.steps}), flush=True)
        self.__init__()  # type: ignore[misc]
