"""Weights & Biases, offline without a login."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from src.loggers.csv import read_table

ACROSS = ("rollout/kl", "rollout/score")  # of the scatter plot: x and y
AXES = {  # group of numbers -> x of their charts; that of the others is the step
    **dict.fromkeys(("rollout", "held_out"), "train/episodes"),
    **dict.fromkeys(("policy", "critic", "time"), "train/iterations"),
}
STAGES = ("sft", "reward", "ppo")


class WandbBoard(WandbLogger):
    """Lightning's logger, and the tables, histograms, alerts, plot and result that make its run a finished board.

    With `offline=None` the run is offline unless there is a login (see `wandb sync`). A run folder has one wandb run,
    which is resumed with it, online or offline. `options`: those of `wandb.init`.
    """

    def __init__(
        self,
        project: str,
        name: str | None,
        save_dir: str,
        offline: bool | None = None,
        group: str | None = None,
        **options: Any,
    ) -> None:
        offline = not wandb.login(prompt=False) if offline is None else offline
        mode, folder = "offline" if offline else "online", Path(save_dir).resolve()
        stage, own = (folder.name, folder.parent.name) if folder.name in STAGES else (folder.parent.name, folder.name)
        given = {"group": group or without_seed(own), "job_type": stage if stage in STAGES else None} | options
        super().__init__(
            project=project, name=name or own, save_dir=save_dir, id=earlier_id(folder), mode=mode, **given
        )
        self._known: set[str] = set()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log the numbers of a step; over what a number is drawn is said before its first value."""
        for name in sorted(metrics.keys() - self._known):
            self._known.add(name)
            if axis := AXES.get(name.split("/")[0]):
                self.experiment.define_metric(name, step_metric=axis)
        super().log_metrics(metrics, step)

    @rank_zero_only
    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Log the distribution of each named row of numbers."""
        self.log_metrics({name: wandb.Histogram(list(row)) for name, row in values.items()}, step)

    @rank_zero_only
    def alert(self, title: str, text: str, step: int) -> None:
        """Show an alarm in the run's alerts."""
        self.experiment.alert(title=title, text=text)

    @rank_zero_only
    def log_figures(self, figures: Mapping[str, float]) -> None:
        """Put the result into the summary, by which runs and sweeps are sorted, and plot reward against KL."""
        self.experiment.summary.update(dict(figures))
        rows = read_table(Path(self._save_dir) / "metrics.csv").values()  # also those of before a resume
        points = [[row[name] for name in ACROSS] for row in rows if all(name in row for name in ACROSS)]
        if points:
            table = wandb.Table(columns=list(ACROSS), data=points)
            self.experiment.log({"reward against KL": wandb.plot.scatter(table, *ACROSS, title="reward against KL")})


def without_seed(name: str) -> str:
    """The name of a run without its seed: what the runs have in common that differ only in that."""
    return re.sub(r"(^|_)seed-\d+(?=_|$)", "", name).strip("_") or "default"


def earlier_id(save_dir: Path) -> str | None:
    """The id of the wandb run that was started in `save_dir`, from its folder `wandb/[offline-]run-TIME-ID`."""
    folders = sorted((save_dir / "wandb").glob("*run-*-*"), key=lambda path: path.name.removeprefix("offline-"))
    return folders[0].name.rsplit("-", 1)[-1] if folders else None
