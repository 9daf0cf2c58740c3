"""The PPO stage: owns policy, critic, reference and reward model, and learns from experience it is handed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from src.core.diagnostics import explained_variance
from src.core.kl import KLEstimator
from src.errors import require
from src.models.forward import next_token_logprobs
from src.models.roles import Roles
from src.modules.checkpoint_filter import keep_trainable, require_trainable
from src.modules.nan_report import nan_report
from src.modules.objective import PolicyLoss, PolicyObjective, ValueLoss, critic_objective
from src.modules.weighted_means import WeightedMeans
from src.rewards.adapter import AdapterReward
from src.rollout.evaluation import Evaluation, merge
from src.rollout.experience import ReferenceKL
from src.rollout.kl_controller import KLController
from src.rollout.minibatches import minibatches
from src.rollout.oom_retry import OomRetry
from src.types import AnyReward, Experience, select
from src.utils.allocator import trim
from src.utils.distributed import per_rank_size, round_robin, sum_gradients
from src.utils.nonfinite import FiniteGuard
from src.utils.seeding import generator
from src.utils.statistics import Figure

Loss = Callable[[Experience, Tensor, WeightedMeans], Tensor]
Texts = dict[str, Tensor]  # ids and mask of the language-model loss


@dataclass(frozen=True)
class PPOSettings:
    """How one batch of experience is learned from."""

    batch_size: int
    epochs: int
    minibatch_size: int
    micro_batch_size: int
    max_grad_norm: float
    entropy_coef: float
    ptx_coef: float
    early_stop_kl: float | None
    critic_warmup: int
    temperature: float

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit into each other and coefficients of the wrong sign."""
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        allowed = f"between 1 and ppo.batch_size ({self.batch_size})"
        require(1 <= self.minibatch_size <= self.batch_size, "minibatch_size", self.minibatch_size, allowed)
        require(self.micro_batch_size >= 1, "micro_batch_size", self.micro_batch_size, "at least 1")
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "greater than 0")
        for name in ("entropy_coef", "ptx_coef", "critic_warmup"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        limit = self.early_stop_kl
        require(limit is None or limit > 0, "early_stop_kl", limit, "greater than 0 nats per token, or null")


class PPOModule(LightningModule):
    """One batch is one PPO iteration: `settings.epochs` passes of minibatches over the experience in it.

    Policy and critic have an optimizer and a gradient norm each, so `trainer.global_step`, which counts optimizer
    steps, counts both; iterations are what is logged as the step.
    """

    def __init__(
        self,
        settings: PPOSettings,
        policy_loss: PolicyLoss,
        old_kl: KLEstimator,
        old_kl_controller: KLController,
        reference_kl: ReferenceKL,
        value_loss: ValueLoss | None,
        aggregation: Callable[[Tensor], Tensor],
        policy_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        critic_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler],
        reward: AnyReward,
        gold_reward: AnyReward | None,
        roles: Callable[..., Roles],
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        nonfinite: FiniteGuard | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds trainable tensors only
        self.settings, self.value_loss, self.aggregation = settings, value_loss, aggregation
        self.optimizer_factories = {"policy": policy_optimizer, "critic": critic_optimizer}
        self.lr_schedule, self.reward, self.gold_reward, self.seed = lr_schedule, reward, gold_reward, seed
        self.roles = roles(tokenizer, critic=value_loss is not None)
        if isinstance(reward, AdapterReward):
            reward.attach(self.roles)
        self.objective = PolicyObjective(
            self.roles, policy_loss, old_kl, old_kl_controller, reference_kl.estimator, settings.entropy_coef,
            settings.temperature,
        )  # fmt: skip
        self.fitting = OomRetry(settings.micro_batch_size, "ppo.micro_batch_size")
        self.nonfinite = nonfinite or FiniteGuard(max_skipped_in_a_row=0, folder=None)
        self.episodes = self.tokens = 0
        self.evaluations: list[Evaluation] = []

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """The policy's optimizer first, then the critic's, where there is one."""
        parameters = {"policy": self.roles.policy_parameters(), "critic": self.roles.critic_parameters()}
        optimizers = [make(parameters[role]) for role, make in self.optimizer_factories.items() if parameters[role]]
        return optimizers, [self.lr_schedule(optimizer) for optimizer in optimizers]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Learn from `batch["experience"]`; log once for the whole iteration."""
        if "experience" not in batch:
            raise RuntimeError(
                "the batch holds no experience: the rollout callback (callbacks.rollout) must be among the callbacks"
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
        """The optimizers by the role they train; Lightning hands out a single one bare."""
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
        seen = this_epoch.compute().get("policy/old_kl")  # None: not one step was finite
        if seen is not None and not self._warming_up(iteration):  # a policy that may not move says nothing of it
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
        """Add up this rank's gradient, from 0, in pieces that fit into memory; what all ranks saw on the way."""

        def work() -> WeightedMeans:
            mine = WeightedMeans()
            for micro, weights in self._micros(minibatch):
                self.manual_backward(loss(micro, weights, mine))
            if text is not None:
                self._text_backward(text, mine)
            return mine

        return self.fitting.attempt(work, len(minibatch), undo=self._optimizers()[role].zero_grad).over_ranks()

    def _warming_up(self, iteration: int) -> bool:
        """Whether only the critic learns as yet."""
        return self.value_loss is not None and iteration < self.settings.critic_warmup

    def _micros(self, minibatch: Experience) -> Iterator[tuple[Experience, Tensor]]:
        """This rank's micro-batches with the weights (N, T') of their tokens in the loss of the whole minibatch."""
        weights = self.aggregation(minibatch.mask)
        for index, micro in self.fitting.micro_batches(minibatch):
            yield micro, weights[index, : micro.mask.shape[1]]

    def _learn_values(self, value_loss: ValueLoss, minibatch: Experience, iteration: int, means: WeightedMeans) -> None:
        """One step of the critic."""
        mine = self._gradients("critic", partial(critic_objective, self.roles, value_loss), minibatch)
        self._step("critic", mine, means, minibatch, iteration)

    def _text_backward(self, text: Texts, means: WeightedMeans) -> None:
        """Add the gradient of ptx_coef times the mean negative logprob of the text's tokens (InstructGPT's PPO-ptx)."""
        tokens = int((text["mask"][:, 1:] & text["mask"][:, :-1]).sum())
        texts = len(text["ids"])
        own = round_robin(torch.arange(texts).split(per_rank_size(texts, self.settings.micro_batch_size)))
        for rows in (piece for dealt_out in own for piece in dealt_out.split(self.fitting.size)):
            with self.roles.acting("policy") as lm:
                logprobs = next_token_logprobs(
                    lm, text["ids"][rows], text["mask"][rows], checkpointing=self.roles.checkpointing
                )
            self.manual_backward(-self.settings.ptx_coef * logprobs.sum() / max(tokens, 1))
            means.add("policy/lm_loss", -logprobs.detach().sum() / max(len(logprobs), 1), len(logprobs))

    def _step(
        self, role: str, mine: WeightedMeans, means: WeightedMeans, minibatch: Experience, iteration: int
    ) -> None:
        """Step on the gradient of all ranks; a step without gradients moves nothing, and keeps the schedules in step.

        `means` take in what was seen, unless loss or gradient is not finite.
        """
        optimizer = self._optimizers()[role]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        sum_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        mine.add(f"{role}/grad_norm", norm)
        finite = self._finite(role, mine, minibatch, iteration)
        if finite:
            means.merge(mine)
        if not finite or (role == "policy" and self._warming_up(iteration)):
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()

    def _finite(self, role: str, mine: WeightedMeans, minibatch: Experience, iteration: int) -> bool:
        """Whether a step may be taken; if not, the minibatch is written down. Raises `NonFiniteError`."""
        return self.nonfinite.passes(
            role, iteration + 1, mine.compute(), lambda: nan_report(self.roles, minibatch, self.fitting.size)
        )

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect what the rollout callback measured on held-out prompts."""
        self.evaluations.append(batch["evaluation"])

    def result(self) -> dict[str, dict[str, Figure]]:
        """What the test measured of the SFT policy (the reference) and of the PPO policy."""
        evaluation = merge(self.evaluations)
        roles = {"sft": evaluation.reference.figures(), "ppo": evaluation.policy.figures()}
        return roles | {"improvement": evaluation.improvement()}

    def save(self, folder: Path) -> Path:
        """Write the policy: `adapter/` for peft (where it is one) and `model/`, a plain Hugging Face folder."""
        if self.roles.save_adapter(folder / "adapter"):
            self.roles.tokenizer.save_pretrained(folder / "adapter")
        self.roles.merged_policy().save_pretrained(folder / "model")
        self.roles.tokenizer.save_pretrained(folder / "model")
        return folder / "model"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable tensors only; the frozen ones are named by the configuration."""
        keep_trainable(self, checkpoint)
        checkpoint["episodes"], checkpoint["tokens"] = self.episodes, self.tokens
        checkpoint["nonfinite"] = self.nonfinite.state_dict()
        checkpoint["old_kl_controller"] = self.objective.old_kl_controller.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counters, and refuse a checkpoint that lacks or exceeds what is trained."""
        require_trainable(self, checkpoint)
        self.episodes, self.tokens = checkpoint["episodes"], checkpoint["tokens"]
        self.nonfinite.load_state_dict(checkpoint["nonfinite"])
        self.objective.old_kl_controller.load_state_dict(checkpoint["old_kl_controller"])


def as_list(x: Any) -> list[Any]:
    """Lightning's "one, several or none" as a list."""
    return list(x) if isinstance(x, list | tuple) else [] if x is None else [x]
