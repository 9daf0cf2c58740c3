"""The policy on held-out prompts while it trains: figures, the best policy, and a stop when none is better."""

from __future__ import annotations

import logging
from math import inf
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.tensor import DTensor

from src.callbacks.rollout import as_prompts
from src.checkpointing.checkpoint import at_end
from src.errors import ConfigError, require
from src.models.weights import restore, snapshot
from src.modules.ppo import PPOModule
from src.rollout.evaluation import Answers, Evaluator, joined
from src.rollout.experience import ExperienceMaker
from src.types import AnyReward
from src.utils.distributed import whole
from src.utils.phases import phase
from src.utils.statistics import Figure

log = logging.getLogger(__name__)


class HeldOut(Callback):
    """Answers held-out prompts every `every` iterations and logs `held_out/NAME`, with 95% intervals.

    `best`: the measure that decides, as `score`; with a minus sign the lowest value is the best. The run then ends with
    the best policy, and after `patience` measurements in a row without a better one. The same random numbers are
    drawn each time, from a stream of their own, so the training of a run is the same without this callback. Must come
    after what ends a training (`Alarms`), or the run would not end with the best policy then.
    """

    def __init__(self, maker: ExperienceMaker, seed: int, every: int, best: str | None, patience: int | None) -> None:
        require(every >= 1, "every", every, "at least 1")
        require(patience is None or patience >= 1, "patience", patience, "at least 1, or null")
        require(patience is None or best is not None, "best", best, "a measure, as patience needs one")
        self.maker, self.seed, self.every, self.best, self.patience = maker, seed, every, best, patience
        self.values: list[float] = []  # of the measure that decides, one per measurement
        self.best_policy: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: PPOModule) -> None:
        """Stop again if the run was interrupted just after its stop."""
        trainer.should_stop = trainer.should_stop or self._ends()

    @phase("measuring")
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: PPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every `every`-th iteration; at the end of the run return to the best policy."""
        iteration = batch_idx + 1
        if iteration % self.every == 0:
            answers = self._answers(trainer, pl_module)
            figures = answers.figures()
            pl_module.log_dict(as_metrics(figures), batch_size=len(answers.prompts))
            self._remember(figures, pl_module)
        trainer.should_stop = trainer.should_stop or self._ends()
        if self.best_policy and at_end(trainer, iteration):
            with torch.no_grad():
                restore(self.best_policy, pl_module.roles.policy_parameters())
            at = (self._best_at() + 1) * self.every
            rank_zero_only(log.info)(f"the policy that is kept is that of iteration {at}, by held-out {self.best}")

    def _answers(self, trainer: Trainer, module: PPOModule) -> Answers:
        evaluator = Evaluator(self.maker, trainer.datamodule.corpus, self.seed)
        rewards: dict[str, AnyReward] = {"score": module.reward}
        if module.gold_reward is not None:
            rewards["gold"] = module.gold_reward
        parts = []
        with trainer.precision_plugin.forward_context():
            for number, batch in enumerate(trainer.datamodule.held_out_dataloader()):
                prompts = as_prompts(trainer.strategy.batch_to_device(batch["prompts"]))
                parts.append(evaluator.answers(module.roles, "policy", rewards, prompts, number))
        return joined(parts)

    def _remember(self, figures: dict[str, Figure], module: PPOModule) -> None:
        if self.best is None:
            return
        name = self.best.removeprefix("-")
        if name not in figures:
            raise ConfigError(f"ppo.held_out.best={self.best}: the measures are {', '.join(sorted(figures))}")
        value = figures[name].value * (-1 if self.best.startswith("-") else 1)
        self.values.append(value if value == value else -inf)  # not a number: worse than any
        if self._best_at() == len(self.values) - 1:
            kept = snapshot(module.roles.policy_parameters())
            self.best_policy = [tensor if isinstance(tensor, DTensor) else tensor.cpu() for tensor in kept]

    def _best_at(self) -> int:
        """The index of the (first) best measurement; -1 before any."""
        return max(range(len(self.values)), key=lambda i: self.values[i], default=-1)

    def _ends(self) -> bool:
        return self.patience is not None and len(self.values) > self._best_at() + self.patience

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far, and the best policy."""
        return {"values": list(self.values), "best_policy": [whole(tensor) for tensor in self.best_policy]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.values, self.best_policy = list(state_dict["values"]), state_dict["best_policy"]


def as_metrics(figures: dict[str, Figure]) -> dict[str, float]:
    """`held_out/NAME`, and the ends of its interval as `held_out/NAME_low` and `held_out/NAME_high`."""
    metrics = {f"held_out/{name}": figure.value for name, figure in figures.items()}
    for name, figure in figures.items():
        if figure.interval is not None:
            metrics[f"held_out/{name}_low"], metrics[f"held_out/{name}_high"] = figure.interval
    return metrics
