"""The PPO stage: owns policy, critic, reference and reward model, and learns from experience it is handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from src.core.aggregation import weighted_sum
from src.core.checks import require
from src.core.diagnostics import explained_variance
from src.core.kl import k3
from src.core.policy_losses import TokenLoss, probability_ratio
from src.models.forward import next_token_logprobs
from src.models.roles import Roles
from src.modules.averages import Averages
from src.rollout.evaluation import Evaluation, merge
from src.rollout.minibatches import micro_batches, minibatches
from src.types import Experience, Reward, select
from src.utils.figures import Figure
from src.utils.streams import generator

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]
ValueLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PPOSettings:
    """How one batch of experience is learned from."""

    batch_size: int
    epochs: int
    minibatch_size: int
    micro_batch_size: int
    max_grad_norm: float
    entropy_coef: float
    lm_coef: float
    old_kl_limit: float | None
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
        for name in ("entropy_coef", "lm_coef", "critic_warmup"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        limit = self.old_kl_limit
        require(limit is None or limit > 0, "old_kl_limit", limit, "greater than 0 nats per token, or null")


class PPOModule(LightningModule):
    """One batch is one PPO iteration: `settings.epochs` passes of minibatches over the experience in it.

    Policy and critic have an optimizer and a gradient norm each, so `trainer.global_step`, which counts optimizer
    steps, counts both; iterations are what is logged as the step.
    """

    def __init__(
        self,
        settings: PPOSettings,
        policy_loss: PolicyLoss,
        value_loss: ValueLoss,
        aggregation: Callable[[Tensor], Tensor],
        policy_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        critic_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler],
        reward: Reward,
        gold_reward: Reward | None,
        roles: Callable[[PreTrainedTokenizerBase], Roles],
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds trainable tensors only
        self.settings, self.policy_loss, self.value_loss, self.aggregation = (
            settings,
            policy_loss,
            value_loss,
            aggregation,
        )
        self.optimizer_factories = (policy_optimizer, critic_optimizer)
        self.lr_schedule = lr_schedule
        self.roles, self.reward, self.gold_reward, self.seed = roles(tokenizer), reward, gold_reward, seed
        self.tokens = 0
        self.evaluations: list[Evaluation] = []

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """The policy's optimizer first, then the critic's."""
        parameters = (self.roles.policy_parameters(), self.roles.critic_parameters())
        optimizers = [make(group) for make, group in zip(self.optimizer_factories, parameters, strict=True)]
        return optimizers, [self.lr_schedule(optimizer) for optimizer in optimizers]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Learn from `batch["experience"]`; log once for the whole iteration."""
        if "experience" not in batch:
            raise RuntimeError(
                "the batch holds no experience: the rollout callback (callbacks.rollout) must be among the callbacks"
            )
        experience: Experience = batch["experience"]
        averages = Averages()
        rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers()]
        optimizer_steps = self._learn(experience, batch.get("text"), batch_idx, averages)
        for schedule in self.lr_schedulers():
            schedule.step()
        self.tokens += int(experience.mask.sum())
        variance = explained_variance(experience.old_values, experience.returns, experience.mask)
        self.log_dict(
            {
                **averages.compute(),
                "critic/explained_variance": variance,
                "policy/lr": rates[0],
                "critic/lr": rates[1],
                "train/optimizer_steps": float(optimizer_steps),
                "train/iterations": float(batch_idx + 1),
                "train/episodes": float((batch_idx + 1) * len(experience)),
                "train/tokens": float(self.tokens),
                "step": float(batch_idx + 1),
            },
            batch_size=len(experience),
        )

    def _learn(self, experience: Experience, text: dict[str, Tensor] | None, iteration: int, averages: Averages) -> int:
        """Run the epochs; returns the number of minibatches learned from before a stop on KL(old || new)."""
        steps = 0
        for epoch in range(self.settings.epochs):
            order = generator(self.seed, "minibatches", self.global_rank, iteration, epoch)
            for index in minibatches(len(experience), self.settings.minibatch_size, order):
                part = {k: v[index] for k, v in text.items()} if text is not None else None
                if not self._learn_minibatch(select(experience, index), part, iteration, averages):
                    averages.add("policy/early_stop", 1.0)
                    return steps
                steps += 1
        averages.add("policy/early_stop", 0.0)
        return steps

    def _learn_minibatch(
        self, minibatch: Experience, text: dict[str, Tensor] | None, iteration: int, averages: Averages
    ) -> bool:
        """One step of each optimizer; False, and no step, when the policy has moved beyond `old_kl_limit`."""
        policy_optimizer, critic_optimizer = self.optimizers()
        weights = self.aggregation(minibatch.mask)
        micros = list(micro_batches(minibatch, self.settings.micro_batch_size))
        mine = Averages()
        for index, micro in micros:
            self._policy_backward(micro, weights[index, : micro.mask.shape[1]], mine)
        if text is not None:
            self._text_backward(text, mine)
        averages.merge(mine)
        limit = self.settings.old_kl_limit
        if limit is not None and mine.compute()["policy/approx_kl"] > limit:
            policy_optimizer.zero_grad()
            return False
        for index, micro in micros:
            self._critic_backward(micro, weights[index, : micro.mask.shape[1]], averages)
        warming_up = iteration < self.settings.critic_warmup
        self._step(policy_optimizer, "policy", averages, skip=warming_up)
        self._step(critic_optimizer, "critic", averages)
        return True

    def _policy_backward(self, micro: Experience, weights: Tensor, averages: Averages) -> None:
        """Add the gradient of sum_t w_t (L_t - entropy_coef H_t)."""
        mask = micro.mask
        logprobs, entropy = self.roles.logprobs(micro.rollout, self.settings.temperature)
        losses, indicators = self.policy_loss(logprobs, micro.old_logprobs, micro.advantages, mask)
        self.manual_backward(weighted_sum(losses - self.settings.entropy_coef * entropy, weights, mask))
        with torch.no_grad():
            moved = {
                "loss": losses,
                "entropy": entropy,
                "ratio": probability_ratio(logprobs, micro.old_logprobs, mask),
                "approx_kl": k3(micro.old_logprobs, logprobs),
            }
            for name, values in (moved | indicators).items():
                averages.add_tokens(f"policy/{name}", values, mask)

    def _critic_backward(self, micro: Experience, weights: Tensor, averages: Averages) -> None:
        """Add the gradient of the critic's loss sum_t w_t L_t."""
        values = self.roles.values(micro.rollout)
        losses, clipped = self.value_loss(values, micro.old_values, micro.returns, micro.mask)
        self.manual_backward(weighted_sum(losses, weights, micro.mask))
        averages.add_tokens("critic/loss", losses, micro.mask)
        averages.add_tokens("critic/clip_fraction", clipped, micro.mask)

    def _text_backward(self, text: dict[str, Tensor], averages: Averages) -> None:
        """Add the gradient of lm_coef times the mean negative logprob of the text's tokens (InstructGPT's PPO-ptx)."""
        tokens = int((text["mask"][:, 1:] & text["mask"][:, :-1]).sum())
        for rows in torch.arange(len(text["ids"])).split(self.settings.micro_batch_size):
            with self.roles.acting("policy") as lm:
                logprobs = next_token_logprobs(lm, text["ids"][rows], text["mask"][rows])
            self.manual_backward(-self.settings.lm_coef * logprobs.sum() / max(tokens, 1))
            averages.add("policy/lm_loss", -logprobs.detach().sum() / max(len(logprobs), 1), len(logprobs))

    def _step(self, optimizer: Any, name: str, averages: Averages, skip: bool = False) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        averages.add(f"{name}/grad_norm", norm)
        if skip:
            optimizer.zero_grad()  # a step without gradients moves nothing, and keeps the schedules in step
        optimizer.step()
        optimizer.zero_grad()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect what the rollout callback measured on held-out prompts."""
        self.evaluations.append(batch["evaluation"])

    def result(self) -> dict[str, dict[str, Figure]]:
        """What the test measured of the SFT policy (the reference) and of the PPO policy."""
        evaluation = merge(self.evaluations)
        return {"sft": evaluation.reference.figures(), "ppo": evaluation.policy.figures(), "rise": evaluation.rise()}

    def save(self, folder: Path) -> Path:
        """Write the policy: `adapter/` for peft (where it is one) and `model/`, a plain Hugging Face folder."""
        if self.roles.save_adapter(folder / "adapter"):
            self.roles.tokenizer.save_pretrained(folder / "adapter")
        self.roles.merged_policy().save_pretrained(folder / "model")
        self.roles.tokenizer.save_pretrained(folder / "model")
        return folder / "model"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable tensors only; the frozen ones are named by the configuration."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["tokens"] = self.tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counters, and refuse a checkpoint that lacks or exceeds what is trained."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        found = set(checkpoint["state_dict"])
        if found != trainable:
            raise RuntimeError(
                f"the checkpoint does not fit this model: missing {sorted(trainable - found)[:3]}, "
                f"unexpected {sorted(found - trainable)[:3]}"
            )
        self.tokens = checkpoint["tokens"]
