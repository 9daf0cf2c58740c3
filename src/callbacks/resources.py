"""Seconds and memory of the iterations, by phase."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from src.utils.phases import STOPWATCH, peak_bytes

GIB = 2**30


class Resources(Callback):
    """Logs the seconds of each phase since the row before, its peak memory where that is known, and the memory held.

    Samples, checkpoints and pages are saved after a row was logged, so their seconds are in the next one. Must come
    after the callbacks that measure.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the stopwatch."""
        STOPWATCH.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log them."""
        seconds, peaks = STOPWATCH.collect()
        numbers = {f"time/seconds_{name}": spent for name, spent in seconds.items()}
        numbers |= {f"time/peak_gib_{name}": peak / GIB for name, peak in peaks.items()}
        pl_module.log_dict(numbers | {"time/memory_gib": memory_gib()}, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it."""
        STOPWATCH.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop it."""
        STOPWATCH.stop()


def memory_gib() -> float:
    """GiB: the most that torch has allocated on a GPU so far; without one what this process holds now."""
    return (peak_bytes() if torch.cuda.is_available() else psutil.Process().memory_info().rss) / GIB
