"""Records the policy gradient of every estimator on each batch of experience."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from src.modules.ppo import PPOModule
from src.rollout.minibatches import micro_batches
from src.types import Experience
from studies.estimators.gradients import EveryEstimator, policy_gradients


class GradientRecorder(Callback):
    """Records from iteration `start` on; before it the critic learns."""

    def __init__(self, estimator: EveryEstimator, start: int) -> None:
        self.estimator, self.start = estimator, start
        self.gradients: dict[str, list[Tensor]] = {name: [] for name in estimator.estimators}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: PPOModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Add this batch's gradients."""
        if batch_idx < self.start:
            return
        with torch.enable_grad():
            parameters = pl_module.roles.policy_parameters()
            found = policy_gradients(self._forward(pl_module, batch["experience"]), self.estimator.latest, parameters)
        for name, gradient in found.items():
            self.gradients[name].append(gradient)

    def _forward(self, module: PPOModule, experience: Experience) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        weights = module.aggregation(experience.mask)
        for index, micro in micro_batches(experience, module.settings.micro_batch_size):
            logprobs = module.roles.distribution(micro.rollout, module.settings.temperature).logprobs()
            yield logprobs, weights[index, : logprobs.shape[1]], index

    def stacked(self) -> dict[str, Tensor]:
        """The gradients of all recorded batches for each estimator, (N, P)."""
        return {name: torch.stack(rows) for name, rows in self.gradients.items()}
