"""Decides *when* experience is made; `src.rollout` does the rest."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from src.modules.ppo import PPOModule
from src.rollout.evaluation import Evaluator
from src.rollout.experience import ExperienceMaker
from src.types import Prompts
from src.utils.allocator import trim
from src.utils.seeding import generator


class RolloutCallback(Callback):
    """Puts `experience` into each training batch and `evaluation` into each test batch, made by the current policy."""

    def __init__(self, maker: ExperienceMaker, seed: int) -> None:
        self.maker, self.seed = maker, seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: PPOModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Sample, score and credit before the module learns."""
        started = time.perf_counter()
        trainer._results.reset()  # Lightning would log again what an earlier iteration logged and this one does not
        prompts = as_prompts(batch["prompts"])
        # 0: the same on every rank, of which each takes what falls to its rows
        draws = generator(self.seed, "sampling", 0, batch_idx, device=prompts.ids.device)
        with trainer.precision_plugin.forward_context():
            experience, measures = self.maker.make(
                pl_module.roles, pl_module.reward, prompts, batch_idx, draws, pl_module.nonfinite
            )
        if pl_module.gold_reward is not None:
            gold = self.maker.scorer.score(pl_module.gold_reward, experience.rollout)
            measures["rollout/gold"] = gold.scores.mean().item()
        trim()  # what sampling and scoring have left is cut to other sizes than learning needs
        batch["experience"] = experience
        shown = {name: value for name, value in measures.items() if name in ("rollout/score", "rollout/kl")}
        pl_module.log_dict(shown, prog_bar=True, batch_size=len(experience))
        pl_module.log_dict(
            {name: value for name, value in measures.items() if name not in shown}
            | {"time/rollout_seconds": time.perf_counter() - started},
            batch_size=len(experience),
        )

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: PPOModule, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the reference and the policy answer the same held-out prompts."""
        evaluator = Evaluator(self.maker, trainer.datamodule.corpus, self.seed)
        with trainer.precision_plugin.forward_context():
            batch["evaluation"] = evaluator.evaluate(
                pl_module.roles, pl_module.reward, pl_module.gold_reward, as_prompts(batch["prompts"]), batch_idx
            )

    def state_dict(self) -> dict[str, Any]:
        """What the next iteration needs beside weights."""
        return self.maker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.maker.load_state_dict(state_dict)


def as_prompts(fields: dict[str, Any]) -> Prompts:
    """The record of a collated batch; Lightning moves plain dictionaries to the device, not frozen records."""
    return Prompts(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
