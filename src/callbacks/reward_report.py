"""A plot of a reward model's margins on held-out pairs and of its calibration."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from src.core.diagnostics import calibration, calibration_error
from src.modules.reward import RewardModule

BINS = 10


class RewardReport(Callback):
    """Plots `reward.png` when the test ends: a histogram of the margins and a reliability curve."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_test_end(self, trainer: Trainer, pl_module: RewardModule) -> None:
        """Plot the margins that the test has collected."""
        draw(torch.cat(pl_module.margins).double(), self.folder / "reward.png")


def draw(margins: Tensor, path: Path) -> None:
    """Left the margins r_w - r_l, right the share of pairs ordered correctly over p = sigmoid(|r_w - r_l|)."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(margins.numpy(), bins=40)
    left.axvline(0, linestyle=":", color="gray", label=f"{(margins > 0).double().mean():.1%} of {len(margins)} above 0")
    left.set_xlabel("margin r(chosen) - r(rejected), as learned")
    left.set_ylabel("held-out pairs")
    bins = calibration(margins, BINS)
    sure, found, count = (x[bins[2] > 0] for x in bins)
    right.plot([0.5, 1], [0.5, 1], linestyle=":", color="gray", label="perfectly calibrated")
    right.plot(sure, found, "-", color="tab:blue")
    right.scatter(sure, found, s=10 + 200 * count / count.max(), label="a bin; its area is the number of pairs")
    right.set_xlabel("p = sigmoid(|margin|)")
    right.set_ylabel("share ordered correctly")
    right.set_title(f"expected calibration error {calibration_error(margins, BINS).item():.3f}")
    for axis in (left, right):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
