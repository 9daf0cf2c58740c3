"""Seconds and memory of the iterations."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Resources(Callback):
    """Logs the seconds of the updates and the memory of each iteration. Must come after `RolloutCallback`."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The rollout has just been made."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log both."""
        spent = {"time/update_seconds": time.perf_counter() - self._started, "time/memory_gib": memory_gib()}
        pl_module.log_dict(spent, batch_size=1)


def memory_gib() -> float:
    """GiB: the most that torch has allocated on a GPU so far; without one what this process holds now."""
    held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return held / 2**30
