"""The workload of every contender, and the clock that times them."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from src.utils.phases import peak_bytes

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
    iterations: int = 2  # of a process; the first warms up, the others are measured
    device: str = "cpu"  # or cuda

    @property
    def heads(self) -> int:
        """Attention heads of width 64, as in GPT-2."""
        return max(1, self.width // 64)

    @property
    def top(self) -> int:
        """How many of the top layers get adapters: 4 of 12."""
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

    @property
    def clock(self) -> str:
        """The seconds that are compared: CPU seconds, as other programs do not lengthen them; on a GPU wall seconds."""
        return "wall" if self.device == "cuda" else "cpu"

    def write(self, folder: Path) -> None:
        """Write workload.json for the contenders."""
        (folder / "workload.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Workload:
        """Read workload.json."""
        return Workload(**json.loads((folder / "workload.json").read_text(encoding="utf-8")))


def on_gpu(layers: int, width: int) -> Workload:
    """Enough work to keep a GPU busy: 64 responses of 256 tokens in minibatches of 16; 3 iterations are measured."""
    return Workload(
        layers, width, rows=64, shortest=64, longest=255, new_tokens=256, minibatch=16, iterations=4, device="cuda"
    )


class Clock:
    """Wall and CPU seconds of the phases, one JSON line per iteration."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.wall, self.cpu = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self.steps = 0
        self.since = time.perf_counter(), time.process_time()

    def lap(self, phase: str) -> None:
        """Assign everything since the last lap to `phase`."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        self.wall[phase] += now[0] - self.since[0]
        self.cpu[phase] += now[1] - self.since[1]
        self.since = now

    def finish(self, response_tokens: int) -> None:
        """Print the iteration and start the next. The peak is that of the process, or of the tensors on the GPU."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.device == "cuda":
            peak = peak_bytes() / 2**30
        line = {"wall": self.wall, "cpu": self.cpu, "peak_gib": peak}
        print(json.dumps(line | {"response_tokens": response_tokens, "optimizer_steps": self.steps}), flush=True)
        self.__init__(self.device)  # type: ignore[misc]
