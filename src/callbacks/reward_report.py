"""A reward model's margins on held-out pairs and its calibration, as a plot and as numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from src.core.diagnostics import calibration, calibration_error
from src.modules.reward import RewardModule
from src.utils.exits import attempt

BINS = 10
NUMBERS = "margins.json"


class RewardReport(Callback):
    """Plots `reward.png` when the test ends: a histogram of the margins and a reliability curve.

    `margins.json` has both as numbers: `edges` and `pairs` of the histogram; `bins`, those with pairs, each with the
    mean probability `p` that the model gives to its own order, the share `right` and the number of `pairs`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_test_end(self, trainer: Trainer, pl_module: RewardModule) -> None:
        """Plot the margins that the test has collected."""
        if trainer.is_global_zero:
            margins = torch.cat(pl_module.margins).double()
            attempt("reward.png", lambda: draw(margins, self.folder / "reward.png"))
            attempt(NUMBERS, lambda: (self.folder / NUMBERS).write_text(json.dumps(numbers(margins)) + "\n"))


def numbers(margins: Tensor) -> dict[str, Any]:
    """Histogram and calibration of the margins, as plain numbers."""
    pairs, edges = torch.histogram(margins, bins=40)
    bins = [
        {"p": p, "right": right, "pairs": int(count)}
        for p, right, count in zip(*(x.tolist() for x in calibration(margins, BINS)), strict=True)
        if count
    ]
    return {"edges": edges.tolist(), "pairs": [int(n) for n in pairs.tolist()], "bins": bins}


def draw(margins: Tensor, path: Path) -> None:
    """Left the margins r_w - r_l, right the share of pairs ordered correctly over p = sigmoid(|r_w - r_l|)."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"reward model on {len(margins)} held-out pairs")
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
