"""A plot of the run: score, gold, KL and losses over PPO iterations."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from src.loggers.csv import read_table

PANELS = {
    "score and gold": ("rollout/score", "rollout/gold"),
    "KL to the reference (nats per sequence)": ("rollout/kl",),
    "response length (tokens)": ("rollout/response_length",),
    "policy loss": ("policy/loss",),
    "critic loss": ("critic/loss",),
    "clip fraction": ("policy/clip_fraction", "critic/clip_fraction"),
}


class Curves(Callback):
    """Plots `metrics.csv` as `curves.png` when training ends."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot every panel whose columns were logged."""
        for logger in trainer.loggers:
            logger.save()
        rows = read_table(self.folder / "metrics.csv")
        if rows and trainer.is_global_zero:
            draw(rows, self.folder / "curves.png")


def draw(rows: dict[int, dict[str, float]], path: Path) -> None:
    """Write a figure with two panels per row."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots(3, 2, sharex=True).flat
    for axis, (title, columns) in zip(axes, PANELS.items(), strict=True):
        for column in columns:
            points = [(step, row[column]) for step, row in sorted(rows.items()) if column in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=column)
                axis.legend(loc="best", fontsize="small")
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
    figure.supxlabel("PPO iteration")
    figure.savefig(path, dpi=100)
