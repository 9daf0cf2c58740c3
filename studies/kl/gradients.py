"""The policy gradient of one batch, with the KL by k1 as a reward, or exact as a reward and in the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from src.core.kl import k1
from src.core.masking import masked
from src.core.rewards import token_rewards
from src.modules.ppo import PPOModule
from src.rollout.experience import ExperienceMaker
from src.rollout.minibatches import micro_batches
from src.types import Episodes, Rollout

FORMS = ("k1", "exact")
PARTS = ("KL part", "whole")  # without and with the score and the critic's values


@dataclass(frozen=True)
class Batch:
    """A scored rollout: scores (B,), shaped, and the weight of each token in the loss (B, T)."""

    rollout: Rollout
    scores: Tensor
    weights: Tensor


def scored(maker: ExperienceMaker, module: PPOModule, rollout: Rollout) -> Batch:
    """The batch of a rollout, with the reward of the run; running moments stay as they are."""
    found = maker.scorer.score(module.reward, rollout)
    shaped = maker.shaping(found.scores, found.rollout.finished)
    return Batch(found.rollout, shaped, module.aggregation(found.rollout.response_mask))


def gradients(maker: ExperienceMaker, module: PPOModule, batch: Batch) -> dict[tuple[str, str], Tensor]:
    """sum_t w_t (A_t grad log pi_t - [exact] beta grad KL_t) of each form and part, (P,) each.

    A is the run's advantage, not whitened, of r_t = score - beta KL_t, with V the critic's; in the KL part score and V
    are 0. k1 has no term in the loss, as its expectation is 0.
    """
    parameters = module.roles.policy_parameters()
    totals = {(form, part): torch.zeros(sum(p.numel() for p in parameters)) for form in FORMS for part in PARTS}
    for logprobs, kl_loss, credits, weights in _micro_batches(maker, module, batch):
        for (form, part), advantages in credits.items():
            objective = (weights * (advantages * logprobs - (kl_loss if form == "exact" else 0.0))).sum()
            pieces = torch.autograd.grad(objective, parameters, retain_graph=True, materialize_grads=True)
            totals[form, part] += torch.cat([piece.reshape(-1) for piece in pieces])
    return totals


Piece = tuple[Tensor, Tensor, dict[tuple[str, str], Tensor], Tensor]


def _micro_batches(maker: ExperienceMaker, module: PPOModule, batch: Batch) -> Iterator[Piece]:
    """Log-probabilities, beta KL, both with gradient, the advantages of each form and part, and the weights."""
    roles, temperature, beta = module.roles, module.settings.temperature, maker.kl_controller.kl_coef
    for index, micro in micro_batches(batch.rollout, module.settings.micro_batch_size):
        mask, width = micro.response_mask, micro.response_ids.shape[1]
        with torch.no_grad():
            reference, values = roles.distribution(micro, temperature, "reference"), roles.values(micro)
            ref_logprobs = reference.logprobs()
        policy = roles.distribution(micro, temperature)
        logprobs, kl = policy.logprobs(), policy.kl(reference)
        sampled = masked(k1(logprobs.detach(), ref_logprobs), mask)
        credit_of = _advantages(maker, micro, beta)
        credits = {}
        for form, each in (("k1", sampled), ("exact", kl.detach())):
            credits[form, "KL part"] = credit_of(torch.zeros_like(batch.scores[index]), each, torch.zeros_like(values))
            credits[form, "whole"] = credit_of(batch.scores[index], each, values)
        yield logprobs, beta * masked(kl, mask), credits, batch.weights[index, :width]


def _advantages(maker: ExperienceMaker, micro: Rollout, beta: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(scores (N,), KL (N, T), values (N, T)) -> the run's advantages (N, T)."""

    def advantages(scores: Tensor, kl: Tensor, values: Tensor) -> Tensor:
        mask = micro.response_mask
        rewards = token_rewards(scores, torch.zeros_like(kl), kl, mask, beta)
        episodes = Episodes(rewards=rewards, mask=mask, group_ids=micro.group_ids, old_values=values)
        return maker.advantage.advantages(episodes)

    return advantages
