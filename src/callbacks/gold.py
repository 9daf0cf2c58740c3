"""The gold meter: the score that is trained on against the one that is not, and a stop when they part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from src.callbacks.csv_logger import read_table
from src.core.checks import require
from src.core.overoptimisation import fit_gao_form, gao_form, turning_point


class GoldCurve(Callback):
    """Draws `gold.png` when training ends: score and gold against d = sqrt(KL), Gao's form, and where gold turns."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, if a gold score and a KL were logged and moved."""
        for logger in trainer.loggers:
            logger.save()
        table = read_table(self.folder / "metrics.csv")
        wanted = ("rollout/score", "rollout/gold", "rollout/kl")
        rows = [[row[name] for name in wanted] for _, row in sorted(table.items()) if all(n in row for n in wanted)]
        if trainer.is_global_zero and len({kl for _, _, kl in rows if kl > 0}) >= 2:
            draw(rows, self.folder / "gold.png")


class GoldStop(Callback):
    """Stops training when the gold score falls while the score rises.

    Both are averaged over windows of `window` iterations. Training ends when `patience` windows in a row have a gold
    lower than the best window's by more than `drop`, and a score above that window's.
    """

    def __init__(self, window: int, drop: float, patience: int) -> None:
        require(window >= 1, "window", window, "at least 1")
        require(drop >= 0, "drop", drop, "at least 0")
        require(patience >= 1, "patience", patience, "at least 1")
        self.window, self.drop, self.patience = window, drop, patience
        self.rows: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that was interrupted just after its stop stays stopped."""
        trainer.should_stop = trainer.should_stop or self._ends()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take note of the iteration, and decide at the end of each window."""
        metrics = trainer.callback_metrics
        if "rollout/gold" not in metrics:
            raise RuntimeError("early_stop=gold needs a gold score: choose one with gold_reward")
        self.rows.append((float(metrics["rollout/score"]), float(metrics["rollout/gold"])))
        if self._ends():
            trainer.should_stop = True
            rank_zero_only(print)(f"stopped after iteration {batch_idx + 1}: gold falls while the score rises")

    def _ends(self) -> bool:
        """Whether a window is full and the scores have parted."""
        return bool(self.rows) and len(self.rows) % self.window == 0 and self._parted()

    def _parted(self) -> bool:
        """Whether the last `patience` windows all lie below the best gold, with a higher score."""
        size = self.window
        windows = [self.rows[start : start + size] for start in range(0, len(self.rows), size)]
        means = [tuple(sum(column) / size for column in zip(*window, strict=True)) for window in windows]
        best = max(range(len(means)), key=lambda i: means[i][1])
        later = means[best + 1 :][-self.patience :]
        return len(later) == self.patience and all(
            gold < means[best][1] - self.drop and score > means[best][0] for score, gold in later
        )

    def state_dict(self) -> dict[str, Any]:
        """The scores so far."""
        return {"rows": [list(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self.rows = [(score, gold) for score, gold in state_dict["rows"]]


def draw(rows: list[list[float]], path: Path) -> None:
    """Points of every iteration, the fit of Gao's form to gold, and its turning point where it has one in sight."""
    scores, gold, kl = torch.tensor(rows, dtype=torch.float64).T
    distance = kl.clamp(min=0).sqrt()
    start = gold[0].item()
    alpha, beta = fit_gao_form(distance, gold - start)
    turn = turning_point(alpha, beta)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    axis.plot(distance, scores, ".", label="score (trained on)")
    axis.plot(distance, gold, ".", label="gold (never trained on)")
    grid = torch.linspace(0, distance.max().item(), 200, dtype=torch.float64)
    axis.plot(grid, start + gao_form(grid, alpha, beta), label=f"gold, d ({alpha:.3g} - {beta:.3g} log d)")
    if turn is not None and turn <= distance.max():
        axis.axvline(turn, linestyle=":", color="grey", label=f"turning point, d = {turn:.2g}")
    axis.set_xlabel("d = sqrt(KL(policy || reference)), KL in nats per sequence")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
