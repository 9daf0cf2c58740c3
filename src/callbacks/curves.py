"""A plot of the run: score, gold, KL and losses over PPO iterations."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.loggers.csv import read_table
from src.utils.exits import attempt

Rows = dict[int, dict[str, float]]

CURVES = "curves.png"

PANELS = {  # title -> label of the y-axis, columns
    "score and gold, with the 95% interval of the score": ("score", ("rollout/score", "rollout/gold")),
    "KL to the reference": ("nats per sequence", ("rollout/kl",)),
    "response length": ("tokens", ("rollout/response_length",)),
    "policy loss": ("loss per token", ("policy/loss",)),
    "critic loss": ("loss per token", ("critic/loss",)),
    "clipped": ("share of tokens", ("policy/clip_fraction", "critic/clip_fraction")),
}


class Curves(Callback):
    """Plots `metrics.csv` as `curves.png` when training ends, also when it is interrupted or fails."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot every panel whose columns were logged."""
        if trainer.is_global_zero:
            attempt(CURVES, lambda: self._save_and_draw(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Plot what there is, unless the run did not get as far as its folder."""
        if self.folder.is_dir():
            self.on_fit_end(trainer, pl_module)

    def _save_and_draw(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        rows = read_table(self.folder / "metrics.csv")
        if rows:
            draw(rows, self.folder / CURVES)


def draw(rows: Rows, path: Path) -> None:
    """Write a figure with two panels per row."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    figure.suptitle(f"{max(rows)} PPO iterations of {path.parent.name}")
    for axis, (title, (label, columns)) in zip(figure.subplots(3, 2, sharex=True).flat, PANELS.items(), strict=True):
        for column in columns:
            points = [(step, row[column]) for step, row in sorted(rows.items()) if column in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=column)
                axis.legend(loc="best", fontsize="small")
        if "rollout/score" in columns:
            _interval(axis, rows)
        axis.set_title(title, fontsize="medium")
        axis.set_ylabel(label)
        axis.set_xlabel("PPO iteration")
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _interval(axis: Axes, rows: Rows) -> None:
    """The normal 95% interval of the mean score over the responses of each iteration."""
    needed = ("rollout/score", "rollout/score_std", "train/episodes", "train/iterations")
    known = {step: row for step, row in sorted(rows.items()) if all(name in row for name in needed)}
    half = [
        1.96 * row["rollout/score_std"] / (row["train/episodes"] / row["train/iterations"]) ** 0.5
        for row in known.values()
    ]
    mean = [row["rollout/score"] for row in known.values()]
    low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
    axis.fill_between(list(known), low, high, alpha=0.2, linewidth=0)
