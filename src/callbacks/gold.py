"""Overoptimization: a plot of the trained score and the gold score, and a stop when gold falls."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor

from src.core.overoptimization import fit_gao_form, gao_form, turning_point
from src.errors import require
from src.loggers.csv import read_table
from src.models.weights import restore
from src.modules.ppo import PPOModule
from src.utils.exits import attempt

log = logging.getLogger(__name__)

GOLD = "gold.png"


class GoldCurve(Callback):
    """Plots `gold.png` when training ends, also when it is interrupted or fails.

    Score and gold over d = sqrt(KL), Gao's fit and its turning point.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot, if a gold score and a KL were logged and changed."""
        if trainer.is_global_zero:
            attempt(GOLD, lambda: self._save_and_draw(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Plot what there is, unless the run did not get as far as its folder."""
        if self.folder.is_dir():
            self.on_fit_end(trainer, pl_module)

    def _save_and_draw(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        rows = gold_rows(self.folder)
        if len({kl for _, _, kl in rows if kl > 0}) >= 2:
            draw(rows, self.folder / GOLD)


class GoldStop(Callback):
    """Stops training when the gold score falls while the score rises, and restores the best policy.

    Both are averaged over windows of `window` iterations. Training ends when `patience` windows in a row have a gold
    lower than the best window's by more than `drop`, and a score above that window's. The restored policy is the one
    that the last iteration of the best window measured, before that iteration's update.
    """

    def __init__(self, window: int, drop: float, patience: int) -> None:
        require(window >= 1, "window", window, "at least 1")
        require(drop >= 0, "drop", drop, "at least 0")
        require(patience >= 1, "patience", patience, "at least 1")
        self.window, self.drop, self.patience = window, drop, patience
        self.rows: list[tuple[float, float]] = []
        self.measured: list[Tensor] = []  # the policy that the last iteration of this window measures
        self.best_policy: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: PPOModule) -> None:
        """Stop again if the run was interrupted just after its stop."""
        trainer.should_stop = trainer.should_stop or self._ends()

    def on_train_batch_start(self, trainer: Trainer, pl_module: PPOModule, batch: Any, batch_idx: int) -> None:
        """At the last iteration of a window take a snapshot of the policy before its update."""
        if (len(self.rows) + 1) % self.window == 0:
            self.measured = [parameter.detach().cpu().clone() for parameter in pl_module.roles.policy_parameters()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: PPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the iteration's scores; at the end of each window keep the policy if it is the best, or stop."""
        metrics = trainer.callback_metrics
        if "rollout/gold" not in metrics:
            raise RuntimeError("early_stop=gold needs a gold score: choose one with gold_reward")
        self.rows.append((float(metrics["rollout/score"]), float(metrics["rollout/gold"])))
        if len(self.rows) % self.window:
            return
        windows = self._windows()
        if self._ends():
            trainer.should_stop = True
            with torch.no_grad():
                restore(self.best_policy, pl_module.roles.policy_parameters())
            rank_zero_only(log.info)(
                f"stopped after iteration {batch_idx + 1}, gold falls while the score rises: "
                f"the policy is that of iteration {(best(windows) + 1) * self.window} again"
            )
        elif best(windows) == len(windows) - 1:
            self.best_policy = self.measured

    def _windows(self) -> list[tuple[float, float]]:
        """Mean (score, gold) of each full window."""
        size = self.window
        starts = range(0, len(self.rows) - size + 1, size)
        windows = [zip(*self.rows[start : start + size], strict=True) for start in starts]
        return [(sum(scores) / size, sum(gold) / size) for scores, gold in windows]

    def _ends(self) -> bool:
        """Whether the last `patience` windows all have a gold below the best one, and a higher score."""
        windows = self._windows()
        if len(self.rows) % self.window or not windows:
            return False
        best_score, best_gold = windows[best(windows)]
        later = windows[best(windows) + 1 :][-self.patience :]
        return len(later) == self.patience and all(
            gold < best_gold - self.drop and score > best_score for score, gold in later
        )

    def state_dict(self) -> dict[str, Any]:
        """The scores so far, and the best policy."""
        return {"rows": [list(row) for row in self.rows], "best_policy": self.best_policy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.rows = [(score, gold) for score, gold in state_dict["rows"]]
        self.best_policy = state_dict["best_policy"]


def best(windows: list[tuple[float, float]]) -> int:
    """The index of the (first) window with the highest gold."""
    return max(range(len(windows)), key=lambda i: windows[i][1])


def gold_rows(folder: Path) -> list[list[float]]:
    """[score, gold, KL] of each iteration of a run that has all three in its metrics.csv."""
    wanted = ("rollout/score", "rollout/gold", "rollout/kl")
    table = read_table(folder / "metrics.csv")
    return [[row[name] for name in wanted] for _, row in sorted(table.items()) if all(name in row for name in wanted)]


def fit_of(rows: list[list[float]]) -> tuple[float, float, float | None]:
    """alpha, beta and the turning point of Gao's form, fitted to gold minus its value in the first iteration."""
    _, gold, kl = torch.tensor(rows, dtype=torch.float64).T
    alpha, beta = fit_gao_form(kl.clamp(min=0).sqrt(), gold - gold[0])
    return alpha, beta, turning_point(alpha, beta)


def draw(rows: list[list[float]], path: Path) -> None:
    """Plot the points of every iteration, the fit of Gao's form to gold, and its turning point if it is in range."""
    scores, gold, kl = torch.tensor(rows, dtype=torch.float64).T
    distance = kl.clamp(min=0).sqrt()
    start = gold[0].item()
    alpha, beta, turn = fit_of(rows)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    axis.plot(distance, scores, ".", label="score (trained on)")
    axis.plot(distance, gold, ".", label="gold (never trained on)")
    grid = torch.linspace(0, distance.max().item(), 200, dtype=torch.float64)
    axis.plot(grid, start + gao_form(grid, alpha, beta), label=f"gold, d ({alpha:.3g} - {beta:.3g} log d)")
    if turn is not None and turn <= distance.max():
        axis.axvline(turn, linestyle=":", color="gray", label=f"turning point, d = {turn:.2g}")
    axis.set_title(f"score and gold over {len(rows)} PPO iterations of {path.parent.name}, each a point")
    axis.set_ylabel("score, gold")
    axis.set_xlabel("d = sqrt(KL(policy || reference)), KL in nats per sequence")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
