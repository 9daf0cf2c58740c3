"""TensorBoard: event files in `tensorboard/` of the run's folder (`tensorboard --logdir logs`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from src.loggers.packages import needs

needs("tensorboard")


class TensorBoardRun(TensorBoardLogger):
    """Lightning's logger, with tables and alarms as texts."""

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="tensorboard", version="", default_hp_metric=False)
        self._last = 0

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the numbers of a step."""
        super().log_metrics(metrics, step)
        self._last = step or self._last

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        """Log a table as a text in Markdown."""
        rows = [columns, ["---"] * len(columns), *data]
        cells = [[str(cell).replace("\n", " ").replace("|", "&#124;") for cell in row] for row in rows]
        self.experiment.add_text(key, "\n".join(f"| {' | '.join(row)} |" for row in cells), self._last)

    @rank_zero_only
    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Log the distribution of each named row of numbers."""
        for name, row in values.items():
            self.experiment.add_histogram(name, np.asarray(row), step)

    @rank_zero_only
    def alert(self, title: str, text: str, step: int) -> None:
        """Show an alarm among the texts."""
        self.experiment.add_text(f"alarms/{title}", text, step)

    @rank_zero_only
    def log_figures(self, figures: Mapping[str, float]) -> None:
        """Log the result as a text."""
        self.log_table("result", ["figure", "value"], [[name, f"{value:.4g}"] for name, value in figures.items()])
