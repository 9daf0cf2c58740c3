"""A long run of a very small model, and what it takes of the machine in each iteration."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from lightning.pytorch import Callback

from src.callbacks.samples import SampleTable
from src.checkpointing.checkpoint import IterationCheckpoint
from src.checkpointing.graceful_stop import GracefulStop
from src.loggers.csv import CsvTables
from src.rollout.kl_controller import AdaptiveKL
from tests.tiny import fit, make_maker, make_module, make_roles


@dataclass
class Taken(Callback):
    """Memory (MiB), open files and threads of this process after each iteration."""

    def __post_init__(self) -> None:
        self.memory: list[float] = []
        self.files: list[int] = []
        self.threads: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        process = psutil.Process()
        self.memory.append(process.memory_info().rss / 2**20)
        self.files.append(process.num_fds())
        self.threads.append(process.num_threads())

    def fifths(self, numbers: list[Any]) -> list[float]:
        """The means of five equal parts."""
        size = len(numbers) // 5
        return [statistics.mean(numbers[i * size : (i + 1) * size]) for i in range(5)]


def soak(base: str, folder: Path, iterations: int) -> Taken:
    """Train with tables, samples and a checkpoint in every iteration; returns what was taken."""
    taken, tables = Taken(), CsvTables(str(folder))

    class WithTables(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.loggers = [tables]  # not the tests' own logger, which keeps every row twice

    module = make_module(make_roles(base), iterations=iterations)
    module.reward.calls = Forgetful()
    callbacks = (
        WithTables(), SampleTable(str(folder / "samples"), every=1, rows=2), taken,
        IterationCheckpoint(str(folder / "checkpoints"), every=1, keep=2), GracefulStop(300),
    )  # fmt: skip
    maker = make_maker(kl_controller=AdaptiveKL(0.1, 1.0, 100))
    fit(module, folder, maker=maker, iterations=iterations, callbacks=callbacks)
    assert len(taken.memory) == iterations
    return taken


class Forgetful(list):  # type: ignore[type-arg]
    """A list that keeps nothing: the scripted reward remembers what it was asked."""

    def append(self, item: Any) -> None:
        pass
