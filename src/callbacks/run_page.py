"""The page of the run, `report.html`, while it trains and when it is cut short."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.report.page import PAGE, write_page
from src.utils.exits import attempt
from src.utils.phases import phase

LEAST_SECONDS = 180.0  # between two pages; one takes about two seconds of a CPU, so about a hundredth of the run


class RunPage(Callback):
    """Writes the page every `every` iterations, at most every three minutes, and when the run is interrupted or fails.

    The page of a finished run is written after its result (`src/runs/start.py`).
    """

    def __init__(self, folder: str, every: int) -> None:
        self.folder, self.every = Path(folder), every
        self._written = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write it if it is due."""
        if (batch_idx + 1) % self.every == 0 and time.monotonic() - self._written > LEAST_SECONDS:
            self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is, unless the run did not get as far as its folder."""
        if self.folder.is_dir():
            self._write(trainer)

    @phase("saving")
    def _write(self, trainer: Trainer) -> None:
        """Write it from the folder, where the tables are first brought up to date."""
        if trainer.is_global_zero:
            attempt(PAGE, lambda: self._save_and_write(trainer))
        self._written = time.monotonic()

    def _save_and_write(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        write_page(self.folder)
