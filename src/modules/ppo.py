"""The PPO stage: owns policy, critic, reference and reward model, and learns from the experience in its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_constant_schedule

from src.core.aggregation import token_mean
from src.core.diagnostics import explained_variance
from src.core.kl import KLEstimator, SampledKL, k3
from src.core.policy_losses import ClippedSurrogate
from src.core.value_losses import ClippedSquaredError
from src.errors import ConfigError, ModelError
from src.models.fingerprint import fingerprint
from src.models.roles import Roles
from src.modules.checkpoint_filter import keep_trainable, require_trainable
from src.modules.nan_report import nan_report
from src.modules.objective import PolicyLoss, PolicyObjective, Texts, ValueLoss, critic_objective, text_objective
from src.modules.settings import PPOSettings
from src.modules.weighted_means import WeightedMeans
from src.rewards.function import as_reward
from src.rollout.evaluation import Evaluation, merge
from src.rollout.kl_controller import FixedKL, KLController
from src.rollout.minibatches import minibatches
from src.rollout.oom_retry import OomRetry
from src.types import AnyReward, Experience, LoadedReward, select
from src.utils.allocator import trim
from src.utils.distributed import clip_gradients, sum_gradients
from src.utils.nonfinite import FiniteGuard
from src.utils.phases import phase
from src.utils.seeding import generator
from src.utils.statistics import Figure

Loss = Callable[[Experience, Tensor, WeightedMeans], Tensor]


def adam(parameters: list[nn.Parameter]) -> Optimizer:
    """Fused Adam with the default learning rate."""
    return Adam(parameters, lr=1e-4, eps=1e-5, fused=True)


class PPOModule(LightningModule):
    """One batch is one PPO iteration: `settings.epochs` passes of minibatches over the experience in it.

    Policy and critic have an optimizer and a gradient norm each. `trainer.global_step` counts the steps of both
    optimizers; the logged step is the iteration.
    """

    def __init__(
        self,
        roles: Roles,
        reward: AnyReward | Callable[..., Any],
        settings: PPOSettings = PPOSettings(),
        *,
        policy_loss: PolicyLoss = ClippedSurrogate(0.2, 0.2),
        value_loss: ValueLoss | None = ClippedSquaredError(0.2),
        old_kl: KLEstimator = SampledKL(k3),
        old_kl_controller: KLController | None = None,
        reference_kl: KLEstimator | None = None,
        aggregation: Callable[[Tensor], Tensor] = token_mean,
        policy_optimizer: Callable[[list[nn.Parameter]], Optimizer] = adam,
        critic_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        lr_schedule: Callable[[Optimizer], LRScheduler] = get_constant_schedule,
        gold_reward: AnyReward | Callable[..., Any] | None = None,
        nonfinite: FiniteGuard | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds trainable tensors only
        self.settings, self.value_loss, self.aggregation = settings, value_loss, aggregation
        self.optimizer_factories = {"policy": policy_optimizer, "critic": critic_optimizer or policy_optimizer}
        self.lr_schedule, self.seed, self.roles = lr_schedule, seed, roles
        self.reward = as_reward(reward)
        self.gold_reward = None if gold_reward is None else as_reward(gold_reward, "gold_reward")
        for part in (self.reward, self.gold_reward):
            if isinstance(part, LoadedReward):
                part.load(roles)
        self.objective = PolicyObjective(
            self.roles, policy_loss, old_kl, old_kl_controller or FixedKL(0.0), reference_kl, settings.entropy_coef,
            settings.temperature,
        )  # fmt: skip
        self.fitting = OomRetry(settings.micro_batch_size, "ppo.micro_batch_size")
        self.nonfinite = nonfinite or FiniteGuard(max_skipped_in_a_row=0, folder=None)
        self.episodes = self.tokens = 0
        self.evaluations: list[Evaluation] = []

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """The policy's optimizer, then the critic's, if there is a critic."""
        parameters = {"policy": self.roles.policy_parameters(), "critic": self.roles.critic_parameters()}
        optimizers = [make(parameters[role]) for role, make in self.optimizer_factories.items() if parameters[role]]
        return optimizers, [self.lr_schedule(optimizer) for optimizer in optimizers]

    @phase("policy")
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Learn from `batch["experience"]`; log once per iteration."""
        if "experience" not in batch:
            raise ConfigError(
                "the batch has no experience to learn from: add RolloutCallback(ExperienceMaker()) to the Trainer's "
                "callbacks"
            )
        experience: Experience = batch["experience"]
        means = WeightedMeans()
        for role, optimizer in self._optimizers().items():
            means.add(f"{role}/lr", optimizer.param_groups[0]["lr"])
        self.objective.remember_old_policy()
        optimizer_steps = self._learn(experience, batch.get("text"), batch_idx, means)
        for schedule in as_list(self.lr_schedulers()):
            schedule.step()
        self.episodes += len(experience)
        self.tokens += int(experience.mask.sum())
        if experience.old_values is not None:
            explained = explained_variance(experience.old_values, experience.returns, experience.mask)
            means.add("critic/explained_variance", explained)
        trim()
        self.log_dict(
            {
                **means.compute(),
                "train/optimizer_steps": float(optimizer_steps),
                "train/skipped_steps": float(self.nonfinite.skipped),
                "train/iterations": float(batch_idx + 1),
                "train/episodes": float(self.episodes),
                "train/tokens": float(self.tokens),
                "step": float(batch_idx + 1),
            },
            batch_size=len(experience),
        )

    def _optimizers(self) -> dict[str, Any]:
        """The optimizers by the role they train; Lightning returns a single one without a list."""
        return dict(zip(self.optimizer_factories, as_list(self.optimizers()), strict=False))

    def _learn(self, experience: Experience, text: Texts | None, iteration: int, means: WeightedMeans) -> int:
        """Run the epochs; returns the number of minibatches learned from before a stop on KL(old || new)."""
        steps, stopped = 0, False
        for epoch in range(self.settings.epochs):
            this_epoch = WeightedMeans()
            for index in self._order(len(experience), iteration, epoch):
                part = {k: v[index] for k, v in text.items()} if text is not None else None
                stopped = not self._learn_minibatch(select(experience, index), part, iteration, this_epoch)
                if stopped:
                    break
                steps += 1
            means.merge(this_epoch)
            if stopped:
                break
        means.add("policy/early_stop", float(stopped))
        seen = this_epoch.compute().get("policy/old_kl")  # None: no step was finite
        if seen is not None and not self._warming_up(iteration):  # the policy did not train, so its KL does not count
            self.objective.old_kl_controller.update(seen, len(experience))
        return steps

    def _order(self, rows: int, iteration: int, epoch: int) -> Iterator[Tensor]:
        order = generator(self.seed, "minibatches", 0, iteration, epoch)  # 0: the same on every rank
        return minibatches(rows, self.settings.minibatch_size, order)

    def _learn_minibatch(self, minibatch: Experience, text: Texts | None, iteration: int, means: WeightedMeans) -> bool:
        """One step of each optimizer; False, and no step, when the policy has moved beyond `early_stop_kl`."""
        mine = self._gradients("policy", self.objective.loss, minibatch, text)
        limit = self.settings.early_stop_kl
        if limit is not None and limit < mine.compute()["policy/old_kl"] < torch.inf:
            means.merge(mine)
            self._optimizers()["policy"].zero_grad()
            return False
        self._step("policy", mine, means, minibatch, iteration)
        if self.value_loss is not None:
            self._learn_values(self.value_loss, minibatch, iteration, means)
        return True

    def _gradients(self, role: str, loss: Loss, minibatch: Experience, text: Texts | None = None) -> WeightedMeans:
        """Accumulate this rank's gradient, from 0, in pieces that fit into memory; returns the means over all ranks."""

        def work() -> WeightedMeans:
            mine = WeightedMeans()
            for micro, weights in self._micros(minibatch):
                self.manual_backward(loss(micro, weights, mine))
            if text is not None:
                pieces = text_objective(self.roles, text, self.settings.micro_batch_size, self.fitting.size, mine)
                for piece in pieces:
                    self.manual_backward(self.settings.ptx_coef * piece)
            return mine

        return self.fitting.attempt(work, len(minibatch), undo=self._optimizers()[role].zero_grad).over_ranks()

    def _warming_up(self, iteration: int) -> bool:
        """Whether only the critic learns in this iteration."""
        return self.value_loss is not None and iteration < self.settings.critic_warmup

    def _micros(self, minibatch: Experience) -> Iterator[tuple[Experience, Tensor]]:
        """This rank's micro-batches with the weights (N, T') of their tokens in the loss of the whole minibatch."""
        weights = self.aggregation(minibatch.mask)
        for index, micro in self.fitting.micro_batches(minibatch):
            own = weights[index, : micro.mask.shape[1]]
            yield micro, own if len(index) else torch.zeros_like(micro.mask, dtype=weights.dtype)

    @phase("critic")
    def _learn_values(self, value_loss: ValueLoss, minibatch: Experience, iteration: int, means: WeightedMeans) -> None:
        """One step of the critic."""
        mine = self._gradients("critic", partial(critic_objective, self.roles, value_loss), minibatch)
        self._step("critic", mine, means, minibatch, iteration)

    def _step(
        self, role: str, mine: WeightedMeans, means: WeightedMeans, minibatch: Experience, iteration: int
    ) -> None:
        """Step on the summed gradient of all ranks; a step without gradients counts for the schedules only.

        `mine` is merged into `means` unless loss or gradient is not finite.
        """
        optimizer = self._optimizers()[role]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        sum_gradients(parameters)
        norm = clip_gradients(parameters, self.settings.max_grad_norm)
        mine.add(f"{role}/grad_norm", norm)
        finite = self._finite(role, mine, minibatch, iteration)
        if finite:
            means.merge(mine)
        if not finite or (role == "policy" and self._warming_up(iteration)):
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()

    def _finite(self, role: str, mine: WeightedMeans, minibatch: Experience, iteration: int) -> bool:
        """Whether loss and gradient are finite; if not, the minibatch is written to a file. Raises `NonFiniteError`."""
        return self.nonfinite.passes(
            role, iteration + 1, mine.compute(), lambda: nan_report(self.roles, minibatch, self.fitting.size)
        )

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect the rollout callback's evaluation on held-out prompts."""
        self.evaluations.append(batch["evaluation"])

    def result(self) -> dict[str, dict[str, Figure]]:
        """Test results of the SFT policy (the reference) and of the PPO policy."""
        evaluation = merge(self.evaluations)
        roles = {"sft": evaluation.reference.figures(), "ppo": evaluation.policy.figures()}
        return roles | {"improvement": evaluation.improvement()}

    def save(self, folder: str | Path) -> Path:
        """Write the policy: `adapter/` for peft (if it is an adapter) and `model/`, a plain Hugging Face folder."""
        folder = Path(folder)
        if self.roles.save_adapter(folder / "adapter"):
            self.roles.tokenizer.save_pretrained(folder / "adapter")
        self.roles.merged_policy().save_pretrained(folder / "model")
        self.roles.tokenizer.save_pretrained(folder / "model")
        return folder / "model"

    @cached_property
    def frozen_fingerprint(self) -> str:
        """The fingerprint of the frozen weights, those of the base."""
        return fingerprint(self.roles, frozen_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable tensors only; frozen ones are loaded from the paths of the configuration."""
        keep_trainable(self, checkpoint)
        checkpoint["episodes"], checkpoint["tokens"] = self.episodes, self.tokens
        checkpoint["nonfinite"] = self.nonfinite.state_dict()
        checkpoint["old_kl_controller"] = self.objective.old_kl_controller.state_dict()
        checkpoint["frozen"] = self.frozen_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; refuse a checkpoint of another model. `RunMetadata` checks the base of a run."""
        require_trainable(self, checkpoint)
        if self._trainer is None:  # `load_from_checkpoint`, which wants every tensor
            if checkpoint["frozen"] != self.frozen_fingerprint:
                raise ModelError("the checkpoint was made with other frozen weights: give roles on the same base model")
            checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]
        self.episodes, self.tokens = checkpoint["episodes"], checkpoint["tokens"]
        self.nonfinite.load_state_dict(checkpoint["nonfinite"])
        self.objective.old_kl_controller.load_state_dict(checkpoint["old_kl_controller"])


def as_list(x: Any) -> list[Any]:
    """One object, several or None, as Lightning returns them, as a list."""
    return list(x) if isinstance(x, list | tuple) else [] if x is None else [x]
