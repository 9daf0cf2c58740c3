"""Calls the experience maker before each training batch and the evaluation in each test batch."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, Trainer

from src.data.checks import prompt_lengths
from src.data.loaders import StreamLoader
from src.data.modules import PromptData
from src.errors import ConfigError, require
from src.models.sharding import is_sharded
from src.modules.ppo import PPOModule
from src.rollout.answering import drawn, rollout_again
from src.rollout.evaluation import Evaluator
from src.rollout.experience import ExperienceMaker
from src.types import Prompts, Rollout
from src.utils.allocator import trim
from src.utils.phases import phase
from src.utils.seeding import generator


class RolloutCallback(Callback):
    """Adds `experience` to each training batch and `evaluation` to each test batch, from the current policy.

    With `lag=1` the responses to a batch's prompts are drawn one iteration early, before the update of the batch
    before: same prompts, same random numbers, the policy of one update less; the first batch is drawn when it comes.
    They are drawn here and in order. An engine that draws while this process trains has the same schedule: it takes the
    weights at the start of an iteration, and its responses are needed at the start of the next. A checkpoint holds the
    responses that wait for the next iteration, as only older weights could draw them again.
    """

    def __init__(self, maker: ExperienceMaker, seed: int = 1, lag: int = 0) -> None:
        require(lag in (0, 1), "lag", lag, "0 or 1")
        self.maker, self.seed, self.lag = maker, seed, lag
        self._ahead: dict[str, Any] | None = None  # `drawn` for the next batch's prompts

    def on_fit_start(self, trainer: Trainer, pl_module: PPOModule) -> None:
        """Refuse settings of module, experience maker and data that do not fit together; say which prompts are cut."""
        require_fitting(self.maker, pl_module, trainer.datamodule)
        self.maker.fitting.alone = pl_module.fitting.alone = not is_sharded(pl_module.roles)
        if trainer.is_global_zero and isinstance(trainer.datamodule, PromptData):
            lengths = prompt_lengths(trainer.datamodule)
            if lengths.level != "ok":
                warnings.warn(f"{lengths.found}: {lengths.mend}", stacklevel=2)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: PPOModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Make experience before the module learns."""
        trainer._results.reset()  # Lightning would repeat metrics of an earlier iteration that this one does not log
        with trainer.precision_plugin.forward_context():
            rollout = self._rollout(pl_module, as_prompts(batch["prompts"]), batch_idx)
            following = self._following(trainer) if self.lag else None
            if following is not None:
                self._ahead = drawn(self._draw(pl_module, following, batch_idx + 1, batch_idx))
            experience, measures = self.maker.experience(
                pl_module.roles, pl_module.reward, rollout, batch_idx, pl_module.nonfinite
            )
        if pl_module.gold_reward is not None:
            with phase("reward"):
                gold = self.maker.scorer.score(pl_module.gold_reward, experience.rollout)
            measures["rollout/gold"] = gold.scores.mean().item()
        trim()  # sampling and scoring leave free blocks of other sizes than learning needs
        batch["experience"] = experience
        shown = {name: value for name, value in measures.items() if name in ("rollout/score", "rollout/kl")}
        pl_module.log_dict(shown, prog_bar=True, batch_size=len(experience))
        pl_module.log_dict(
            {name: value for name, value in measures.items() if name not in shown}, batch_size=len(experience)
        )

    def _rollout(self, module: PPOModule, prompts: Prompts, iteration: int) -> Rollout:
        """The responses that were drawn ahead for these prompts, else responses of the policy as it is now."""
        ahead, self._ahead = self._ahead, None
        found = None if ahead is None else rollout_again(module.roles, prompts, ahead)
        return self._draw(module, prompts, iteration, iteration) if found is None else found

    def _draw(self, module: PPOModule, prompts: Prompts, batch: int, policy_version: int) -> Rollout:
        """Responses of the policy as it is now to the prompts of a batch."""
        # 0: the same numbers on every rank; each uses those of its rows
        draws = generator(self.seed, "sampling", 0, batch, device=prompts.ids.device)
        return self.maker.draw(module.roles, prompts, policy_version, draws)

    def _following(self, trainer: Trainer) -> Prompts | None:
        """The prompts of the next batch; None in the last iteration."""
        loader = trainer.train_dataloader["prompts"] if isinstance(trainer.train_dataloader, dict) else None
        if not isinstance(loader, StreamLoader):
            raise ConfigError("lag=1 draws the next batch early, so it needs PromptData, which knows its prompts")
        batch = loader.peek()
        return None if batch is None else as_prompts(trainer.strategy.batch_to_device(batch))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: PPOModule, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate the reference and the policy on the same held-out prompts."""
        evaluator = Evaluator(self.maker, trainer.datamodule.corpus, self.seed)
        with trainer.precision_plugin.forward_context():
            batch["evaluation"] = evaluator.evaluate(
                pl_module.roles, pl_module.reward, pl_module.gold_reward, as_prompts(batch["prompts"]), batch_idx
            )

    def on_exception(self, trainer: Trainer, pl_module: PPOModule, exception: BaseException) -> None:
        """Close the engine."""
        self.maker.engine.close()

    def teardown(self, trainer: Trainer, pl_module: PPOModule, stage: str) -> None:
        """Close the engine."""
        self.maker.engine.close()

    def state_dict(self) -> dict[str, Any]:
        """State of the next iteration besides weights."""
        return self.maker.state_dict() | {"ahead": self._ahead}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.maker.load_state_dict(state_dict)
        self._ahead = state_dict["ahead"] if self.lag else None


def require_fitting(maker: ExperienceMaker, module: PPOModule, data: Any) -> None:
    """Raise `ConfigError` for settings of maker, module and data that do not fit together."""
    sampled, learned = maker.sampler.temperature, module.settings.temperature
    if sampled != learned:
        raise ConfigError(f"the temperature is {sampled} in Sampler, {learned} in PPOSettings: give both the same")
    critic, advantage = maker.advantage.needs_values, type(maker.advantage).__name__
    if not critic == (module.value_loss is not None) == (module.roles.value_head is not None):
        wanted = "critic=True and a value_loss" if critic else "critic=False and value_loss=None"
        raise ConfigError(f"{advantage} {'needs' if critic else 'does not use'} a critic: give {wanted}")
    samples = getattr(data, "samples_per_prompt", None)
    if maker.advantage.needs_groups and samples == 1:
        mend = "give PromptData(samples_per_prompt=4), at least 2"
        raise ConfigError(f"{advantage} compares samples of one prompt, and there is 1 of each: {mend}")
    if maker.reference_kl.in_loss and module.objective.reference_kl is None:
        raise ConfigError("ReferenceKL(in_loss=True) needs the same estimator as PPOModule(reference_kl=...)")


def as_prompts(fields: dict[str, Any]) -> Prompts:
    """The `Prompts` of a collated batch; Lightning moves plain dictionaries to the device, not frozen records."""
    return Prompts(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
