"""Prompts in, experience out: sample, score, compare with the reference, credit each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.core.advantages import GAE
from src.core.kl import k1
from src.core.masking import masked, whiten
from src.core.rewards import token_rewards
from src.models.roles import Role, Roles
from src.models.text import response_text
from src.rollout.kl_controller import AdaptiveKL, FixedKL
from src.rollout.minibatches import join, micro_batches
from src.rollout.sampling import Sampler
from src.rollout.shaping import ScoreShaping
from src.types import Experience, Prompts, Reward, Rollout


class ExperienceMaker:
    """Makes the experience of one PPO iteration; `kl_controller` is its only state."""

    def __init__(
        self,
        sampler: Sampler,
        shaping: ScoreShaping,
        kl_controller: FixedKL | AdaptiveKL,
        advantage: GAE,
        whiten_advantages: bool,
        batch_size: int,
    ) -> None:
        self.sampler, self.shaping, self.kl_controller, self.advantage = sampler, shaping, kl_controller, advantage
        self.whiten_advantages, self.batch_size = whiten_advantages, batch_size

    def make(
        self, roles: Roles, reward: Reward, prompts: Prompts, policy_version: int, generator: torch.Generator
    ) -> tuple[Experience, dict[str, float]]:
        """The experience of one batch of prompts, and what it says of the policy.

        1. sample responses; 2. score them; 3. logprobs of policy and reference, values; 4. shape the scores;
        5. rewards per token with the KL to the reference; 6. advantages and returns; 7. whiten; 8. steer the KL.
        """
        # 1-3
        rollout = self.sample(roles, "policy", prompts, policy_version, generator)
        scores = self.score(reward, rollout)
        old_logprobs, ref_logprobs, old_values = self._judge(roles, rollout)
        mask = rollout.response_mask
        # 4, 5
        kl = masked(k1(old_logprobs, ref_logprobs), mask)
        shaped = self.shaping(scores, rollout.finished)
        kl_coef = self.kl_controller.kl_coef
        rewards = token_rewards(shaped, kl, mask, kl_coef)
        # 6, 7
        advantages, returns = self.advantage(rewards, mask, old_values)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask)
        # 8
        self.kl_controller.update(kl.sum(1).mean().item(), len(scores))
        experience = Experience(rollout, old_logprobs, ref_logprobs, old_values, scores, rewards, advantages, returns)
        return experience, describe(rollout) | {
            "rollout/score": scores.mean().item(),
            "rollout/score_std": scores.std(correction=0).item(),
            "rollout/shaped_score": shaped.mean().item(),
            "rollout/reward": rewards.sum(1).mean().item(),
            "rollout/kl": kl.sum(1).mean().item(),
            "rollout/kl_coef": kl_coef,
        }  # fmt: skip

    @torch.no_grad()
    def sample(
        self, roles: Roles, role: Role, prompts: Prompts, policy_version: int, generator: torch.Generator | None
    ) -> Rollout:
        """Responses of `role`, drawn from `generator` (None: greedy)."""
        tokenizer = roles.tokenizer
        stop_ids = torch.tensor([tokenizer.eos_token_id], device=prompts.ids.device)
        with roles.acting(role) as lm:
            ids, mask, logprobs, finished = self.sampler.sample(
                lm, prompts.ids, prompts.mask, stop_ids, tokenizer.pad_token_id, generator
            )
        responses = tuple(
            response_text(tokenizer, prompt[prompt_mask], response[response_mask])
            for prompt, prompt_mask, response, response_mask in zip(prompts.ids, prompts.mask, ids, mask, strict=True)
        )
        return Rollout(
            prompts.ids, prompts.mask, ids, mask, logprobs, finished, prompts.index, prompts.group_ids,
            prompts.texts, responses, prompts.metadata, policy_version,
        )  # fmt: skip

    def score(self, reward: Reward, rollout: Rollout) -> Tensor:
        """r(x, y), (B,) on the rollout's device. Raises `ValueError` for a wrong count or a number not finite."""
        metadata: list[dict[str, Any]] = [
            row | {"finished": finished}
            for row, finished in zip(rollout.metadata, rollout.finished.tolist(), strict=True)
        ]
        scores = reward.score(list(rollout.prompts), list(rollout.responses), metadata)
        scores = torch.as_tensor(scores, dtype=torch.float32).to(rollout.finished.device)
        name = type(reward).__name__
        if scores.shape != rollout.finished.shape:
            raise ValueError(f"reward {name} gave {tuple(scores.shape)} scores for {len(rollout.prompts)} sequences")
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(
                f"reward {name} gave {scores[row].item()} for prompt {rollout.prompts[row]!r}, "
                f"response {rollout.responses[row]!r}; a score must be a finite number"
            )
        return scores

    def _judge(self, roles: Roles, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Logprobs of policy and reference, and values, each (B, T), by the same path that trains."""

        def logprobs_of(role: Role) -> Callable[[Rollout], Tensor]:
            return lambda micro: roles.logprobs(micro, self.sampler.temperature, role)[0]

        return (
            self.in_micro_batches(logprobs_of("policy"), rollout),
            self.in_micro_batches(logprobs_of("reference"), rollout),
            self.in_micro_batches(roles.values, rollout),
        )

    @torch.no_grad()
    def in_micro_batches(self, judge: Callable[[Rollout], Tensor], rollout: Rollout) -> Tensor:
        """`judge` of the whole rollout, (B, T), computed `batch_size` rows at a time."""
        micros = micro_batches(rollout, self.batch_size)
        return join([(index, judge(micro)) for index, micro in micros], rollout.response_mask.shape)


def describe(rollout: Rollout) -> dict[str, float]:
    """What the responses look like: length in tokens, the share ended by a stop token, nats per token."""
    mask = rollout.response_mask
    return {
        "rollout/response_length": mask.sum(1).float().mean().item(),
        "rollout/eos_fraction": rollout.finished.float().mean().item(),
        "rollout/nats_per_token": (-rollout.behaviour_logprobs.sum() / mask.sum().clamp(min=1)).item(),
    }
