"""A Rich progress bar that counts what a stage counts: PPO iterations, or steps."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class StageProgress(RichProgressBar):
    """Lightning's bar with the stage's own unit in front; epochs mean nothing here, as a stage has one."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def _get_train_description(self, current_epoch: int) -> str:
        return self.unit
