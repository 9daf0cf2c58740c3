"""Phi_t of the policy gradient E[sum_t grad log pi(a_t|s_t) Phi_t]: what an action is credited with.

Pure functions of per-token rewards and values; `src.core.estimators` makes them choices. Tokens that do not count
inside a row (tool output, say) are skipped: a result equals that of the row without them. After the last counted token
rewards, values and Phi are 0, also where a response was cut off without a stop token.
"""

from __future__ import annotations

import torch

from src.core.masking import first_counted, masked, masked_mean
from src.core.shapes import Flags, Indices, Mask, PerSequence, PerToken


def discounted_sum(x: PerToken, mask: Mask, discount: float) -> PerToken:
    """y_t = x_t + discount y_{t+1} = sum_l discount^l x_{t+l} over the counted tokens.

    Shapes: x, mask (B, T) -> (B, T), 0 outside the mask.
    """
    x = masked(x, mask)
    following = torch.zeros_like(x[:, 0])
    result = torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        here = x[:, t] + discount * following
        following = torch.where(mask[:, t], here, following)
        result[:, t] = masked(here, mask[:, t])
    return result


def reward_to_go(rewards: PerToken, mask: Mask, gamma: float) -> PerToken:
    """G_t = sum_l gamma^l r_{t+l}: an action is credited with what comes after it.

    Source: REINFORCE, Williams 1992 (https://doi.org/10.1007/BF00992696). Shapes: (B, T) -> (B, T).
    """
    return discounted_sum(rewards, mask, gamma)


def total_return(rewards: PerToken, mask: Mask, gamma: float) -> PerToken:
    """R(tau) = sum_t gamma^t r_t: every action is credited with the whole episode, its past included.

    Shapes: (B, T) -> (B, T), the same number at each counted token of a row.
    """
    from_start = reward_to_go(rewards, mask, gamma).gather(1, first_counted(mask).unsqueeze(1))
    return masked(from_start.expand_as(mask), mask)


def td_errors(rewards: PerToken, values: PerToken, mask: Mask, gamma: float) -> PerToken:
    """delta_t = r_t + gamma V_{t+1} - V_t: the actor-critic's one-step advantage, V = 0 after the last token.

    Source: Sutton & Barto, section 13.5 (http://incompleteideas.net/book/the-book-2nd.html). Shapes: (B, T) -> (B, T).
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    next_value = torch.zeros_like(values[:, 0])
    errors = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        errors[:, t] = rewards[:, t] + gamma * next_value - values[:, t]
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return masked(errors, mask)


def gae(rewards: PerToken, values: PerToken, mask: Mask, gamma: float, lam: float) -> PerToken:
    """A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t.

    Source: Schulman et al., eq. 16 (https://arxiv.org/abs/1506.02438). lam = 0 gives delta_t, lam = 1 gives G_t - V_t.
    Shapes: rewards, values, mask (B, T) -> (B, T), 0 outside the mask.
    """
    return discounted_sum(td_errors(rewards, values, mask, gamma), mask, gamma * lam)


def lambda_returns(rewards: PerToken, values: PerToken, mask: Mask, gamma: float, lam: float) -> PerToken:
    """R_t = A_t^{GAE(gamma, lam)} + V_t: the critic's target; lam = 1 gives G_t, lam = 0 gives r_t + gamma V_{t+1}.

    Shapes: rewards, values, mask (B, T) -> (B, T), 0 outside the mask.
    """
    return gae(rewards, values, mask, gamma, lam) + masked(values, mask)


def batch_mean_baseline(rewards: PerToken, mask: Mask, gamma: float) -> PerToken:
    """G_t - b, b the mean of G over the counted tokens of the batch. Shapes: (B, T) -> (B, T)."""
    to_go = reward_to_go(rewards, mask, gamma)
    return masked(to_go - masked_mean(to_go, mask), mask)


def groups(group_ids: Indices) -> Indices:
    """The groups numbered from 0, whatever their ids. Shapes: (B,) int64 -> (B,) int64."""
    return torch.unique(group_ids, return_inverse=True)[1]  # type: ignore[no-any-return]


def group_sum(x: PerSequence, group_ids: Indices) -> PerSequence:
    """For each row the sum of x over the rows of its group. Shapes: x (B,), group_ids (B,) int64 -> (B,)."""
    group = groups(group_ids)
    return torch.zeros_like(x).index_add(0, group, x)[group]


def unequal(scores: PerSequence, group_ids: Indices) -> Flags:
    """max R > min R of the group: whether the scores of a row's group differ. Shapes: scores, group_ids (B,) -> (B,).

    Otherwise equal scores would differ by rounding alone, and whitening would turn that into advantages.
    """
    group = groups(group_ids)
    highest, lowest = (
        torch.zeros_like(scores).scatter_reduce(0, group, scores, reduce=how, include_self=False)[group]
        for how in ("amax", "amin")
    )
    return highest > lowest


def leave_one_out(scores: PerSequence, group_ids: Indices) -> PerSequence:
    """A_i = R_i - mean_{j != i} R_j within the group: sums to 0 over a group, and is G / (G - 1) (R_i - mean R).

    Source: RLOO (https://arxiv.org/abs/2402.14740). A group whose scores are all equal (one row alone too) gives
    exactly 0.
    Shapes: scores (B,), group_ids (B,) -> (B,).
    """
    others = group_sum(torch.ones_like(scores), group_ids) - 1
    difference = scores - (group_sum(scores, group_ids) - scores) / others.clamp(min=1)
    return torch.where(unequal(scores, group_ids), difference, torch.zeros_like(scores))


def group_relative(scores: PerSequence, group_ids: Indices, *, scale: bool) -> PerSequence:
    """A_i = R_i - mean R of the group; with `scale` divided by (std of the group + 1e-6), std with G - 1.

    Source: GRPO (https://arxiv.org/abs/2402.03300); without the division Dr. GRPO (https://arxiv.org/abs/2503.20783).
    A group whose scores are all equal (one row alone too) gives exactly 0.
    Shapes: scores (B,), group_ids (B,) -> (B,).
    """
    size = group_sum(torch.ones_like(scores), group_ids)
    centered = scores - group_sum(scores, group_ids) / size
    if scale:
        variance = group_sum(centered.square(), group_ids) / (size - 1).clamp(min=1)
        centered = centered / (variance.sqrt() + 1e-6)
    return torch.where(unequal(scores, group_ids), centered, torch.zeros_like(scores))


def per_token(scores: PerSequence, mask: Mask) -> PerToken:
    """One number per sequence, given to each of its counted tokens. Shapes: (B,), (B, T) -> (B, T)."""
    return masked(scores.unsqueeze(1).expand_as(mask), mask)
