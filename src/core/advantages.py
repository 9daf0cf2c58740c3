"""Phi_t of the policy gradient E[sum_t grad log pi(a_t|s_t) Phi_t]: what an action is credited with.

Every estimator is a pure function of per-token rewards and values, plus a small frozen object that holds its settings
and says what it needs. The policy loss never knows which one was used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from src.core.checks import require
from src.core.masking import masked


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t.

    Source: Schulman et al., eq. 16 (https://arxiv.org/abs/1506.02438). After the last counted token V and A are 0, also
    where a response was cut off without a stop token. Tokens that do not count inside a row (tool output, say) are
    skipped: the result equals that of the row without them.
    Shapes: rewards, values, mask (B, T) -> advantages (B, T), 0 outside the mask.
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = masked(advantage, mask[:, t])
    return advantages


def lambda_returns(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """R_t = A_t^{GAE(gamma, lam)} + V_t: the critic's target; lam = 1 gives sum_l gamma^l r_{t+l}.

    Shapes: rewards, values, mask (B, T) -> returns (B, T), 0 outside the mask.
    """
    return gae(rewards, values, mask, gamma, lam) + masked(values, mask)


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation; `critic_lam` is the lambda of the critic's target."""

    gamma: float
    lam: float
    critic_lam: float

    needs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse discounts outside [0, 1]."""
        for name in ("gamma", "lam", "critic_lam"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")

    def __call__(self, rewards: Tensor, mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return (advantages, returns), each (B, T)."""
        advantages = gae(rewards, values, mask, self.gamma, self.lam)
        return advantages, lambda_returns(rewards, values, mask, self.gamma, self.critic_lam)
