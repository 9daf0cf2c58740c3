"""A Rich progress bar of one line at 80 columns: steps of the stage, rate, time left, and the main metrics."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text


class RateColumn(ProgressColumn):
    """Steps per second, or seconds per step if a step takes longer than one."""

    def render(self, task: Task) -> Text:
        """Empty before the first step."""
        if not task.speed:
            return Text()
        return Text(f"{task.speed:.1f}/s" if task.speed >= 1 else f"{1 / task.speed:.1f} s each")


class StageProgress(RichProgressBar):
    """Lightning's bar with the stage's unit in front, without epochs, as a stage has one."""

    def __init__(self, unit: str) -> None:
        super().__init__(leave=True)
        self.unit = unit

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Count, rate and time left, without the bar of blocks, which needs three times the width."""
        narrow = Column(no_wrap=True)
        return [
            TextColumn("{task.description}", table_column=narrow),
            MofNCompleteColumn(table_column=narrow),
            RateColumn(table_column=narrow),
            TextColumn("left", table_column=narrow),
            TimeRemainingColumn(table_column=narrow),
        ]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics by the last part of their names: `score 0.81`, not `rollout/score: 0.81`."""
        return {name.rpartition("/")[2]: value for name, value in super().get_metrics(trainer, pl_module).items()}

    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self._metric_component is not None:
            self._metric_component._table_column = Column(no_wrap=True, overflow="ellipsis")

    def _get_train_description(self, current_epoch: int) -> str:
        return self.unit

    @property
    def test_description(self) -> str:
        """What Lightning calls testing."""
        return "held-out rows"
