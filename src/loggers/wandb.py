"""Weights & Biases, offline without a login."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

ACROSS = ("rollout/kl", "rollout/score")  # of the scatter plot: x and y


class WandbBoard(WandbLogger):
    """Lightning's logger, and the tables, histograms, alerts, plot and result that make its run a finished board.

    With `offline=None` the run is offline unless there is a login (see `wandb sync`). A run folder has one wandb run,
    which is resumed with it, online or offline. `options`: those of `wandb.init`.
    """

    def __init__(
        self, project: str, name: str | None, save_dir: str, offline: bool | None = None, **options: Any
    ) -> None:
        offline = not wandb.login(prompt=False) if offline is None else offline
        mode, run = "offline" if offline else "online", earlier_id(Path(save_dir))
        super().__init__(project=project, name=name, save_dir=save_dir, id=run, mode=mode, **options)
        self._points: list[list[float]] = []

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the numbers of a step, and keep those of the scatter plot."""
        super().log_metrics(metrics, step)
        if all(name in metrics for name in ACROSS):
            self._points.append([float(metrics[name]) for name in ACROSS])

    @rank_zero_only
    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Log the distribution of each named row of numbers."""
        super().log_metrics({name: wandb.Histogram(list(row)) for name, row in values.items()}, step)

    @rank_zero_only
    def alert(self, title: str, text: str, step: int) -> None:
        """Show an alarm in the run's alerts."""
        self.experiment.alert(title=title, text=text)

    @rank_zero_only
    def log_figures(self, figures: Mapping[str, float]) -> None:
        """Put the result into the summary, by which runs and sweeps are sorted, and plot reward against KL."""
        self.experiment.summary.update(dict(figures))
        if self._points:
            table = wandb.Table(columns=list(ACROSS), data=self._points)
            self.experiment.log({"reward against KL": wandb.plot.scatter(table, *ACROSS, title="reward against KL")})


def earlier_id(save_dir: Path) -> str | None:
    """The id of the wandb run that was started in `save_dir`, from its folder `wandb/[offline-]run-TIME-ID`."""
    folders = sorted((save_dir / "wandb").glob("*run-*-*"), key=lambda path: path.name.removeprefix("offline-"))
    return folders[0].name.rsplit("-", 1)[-1] if folders else None
