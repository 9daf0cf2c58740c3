"""Metrics of a batch of experience, and the weights that correct for the policy that sampled it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from src.core.correction import effective_sample_size
from src.core.kl import k3
from src.core.masking import masked_mean
from src.core.policy_losses import probability_ratio
from src.errors import RewardError
from src.rollout.scoring import Scored
from src.types import Rollout

Correction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def describe(scored: Scored, shaped: Tensor, rewards: Tensor) -> dict[str, float]:
    """Metrics of scores, rewards and responses: length in tokens, share that ended, nats per token."""
    rollout, scores, mask = scored.rollout, scored.scores, scored.rollout.response_mask
    measures = {
        "rollout/response_length": mask.sum(1).float().mean().item(),
        "rollout/eos_fraction": rollout.finished.float().mean().item(),
        "rollout/nll_per_token": (-rollout.behavior_logprobs.sum() / mask.sum().clamp(min=1)).item(),
        "rollout/score": scores.mean().item(),
        "rollout/score_std": scores.std(correction=0).item(),
        "rollout/shaped_score": shaped.mean().item(),
        "rollout/reward": rewards.sum(1).mean().item(),
        "rollout/dropped": float(scored.dropped),
    }
    parts = {f"rollout/score_{name}": part.mean().item() for name, part in scored.parts.items()}
    for name in measures.keys() & parts.keys():
        part = name.partition("score_")[2]
        raise RewardError(f"a part of the reward is called {part!r}, and {name} is another metric: rename the part")
    return measures | parts


def corrected(
    correction: Correction | None, rollout: Rollout, old_logprobs: Tensor
) -> tuple[Tensor | None, dict[str, float]]:
    """The weight of each token's policy loss, (B, T); None without a correction.

    And how far the policy that sampled is from the old one: KL(behavior || old) in nats per token, the largest ratio of
    a token's probabilities, and of a correction the effective sample size and the share of tokens that it bounds.
    """
    mask, behavior_logprobs = rollout.response_mask, rollout.behavior_logprobs
    ratio = probability_ratio(old_logprobs, behavior_logprobs, mask)
    measures = {
        "rollout/behavior_kl": masked_mean(k3(behavior_logprobs, old_logprobs), mask).item(),
        "rollout/behavior_ratio_max": ratio[mask].max().item(),
    }
    if correction is None:
        return None, measures
    weights, bounded = correction(old_logprobs, behavior_logprobs, mask)
    return weights, measures | {
        "rollout/effective_sample_size": effective_sample_size(weights, mask).item(),
        "rollout/capped_fraction": masked_mean(bounded, mask).item(),
    }
