"""Checkpoints of trainable tensors, at iteration boundaries only, each written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.core.checks import require


class IterationCheckpoint(Callback):
    """Saves `folder/iteration-N.ckpt` after every `every` batches and after the last, and keeps the newest `keep`."""

    def __init__(self, folder: str, every: int, keep: int) -> None:
        require(every >= 1, "every", every, "at least 1")
        require(keep >= 1, "keep", keep, "at least 1")
        self.folder, self.every, self.keep = Path(folder), every, keep

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write to a temporary file, flush it to the disk, rename it."""
        done = batch_idx + 1
        if done % self.every and done != trainer.num_training_batches:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary, final = self.folder / "writing.tmp", self.folder / f"iteration-{done}.ckpt"
        trainer.save_checkpoint(temporary)  # all ranks come here; the first writes
        if not trainer.is_global_zero:
            return
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(final)
        for old in checkpoints(self.folder)[: -self.keep]:
            old.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say what an interrupted run leaves."""
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            saved = checkpoints(self.folder)
            kept = f"{saved[-1]} is kept" if saved else "no iteration was finished"
            print(f"\ninterrupted: {kept}; the same command goes on from there (resume=never starts anew)")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("iteration-*.ckpt"), key=lambda path: int(path.stem.removeprefix("iteration-")))
