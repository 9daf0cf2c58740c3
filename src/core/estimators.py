"""The choices of Phi_t: small objects with their settings and what they need.

The policy loss never knows which one was used. All but the running baseline are frozen; its memory is part of a
checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from src.core.advantages import (
    batch_mean_baseline,
    gae,
    group_relative,
    lambda_returns,
    leave_one_out,
    per_token,
    reward_to_go,
    td_errors,
    total_return,
)
from src.core.masking import masked, masked_mean, whiten
from src.core.shapes import AnyFloat, PerToken
from src.errors import require
from src.types import Episodes


def require_unit(owner: Any, *names: str) -> None:
    """Refuse a setting outside [0, 1]."""
    for name in names:
        require(0 <= getattr(owner, name) <= 1, name, getattr(owner, name), "between 0 and 1")


def require_given(x: AnyFloat | None) -> AnyFloat:
    """x, which the estimator needs. Raises `ValueError` where the episodes lack it."""
    if x is None:
        raise ValueError("the episodes lack what this estimator needs (see needs_values and needs_greedy)")
    return x


class Estimator(ABC):
    """Phi_t of a batch of episodes, and what is needed to compute it."""

    needs_values: ClassVar[bool] = False  # a critic is built, trained and stored
    needs_groups: ClassVar[bool] = False  # several samples of each prompt
    needs_greedy: ClassVar[bool] = False  # the score of the greedy response to each prompt

    @abstractmethod
    def advantages(self, episodes: Episodes) -> PerToken:
        """Phi_t, (B, T), 0 outside the mask."""

    def returns(self, episodes: Episodes) -> PerToken | None:
        """The critic's target, (B, T); None where there is no critic."""
        return None

    def update(self, episodes: Episodes) -> None:  # noqa: B027 - most estimators have no memory
        """Remember what the next batch needs, after the advantages of this one were computed."""

    def state_dict(self) -> dict[str, Any]:
        """What `update` remembers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore it."""


@dataclass(frozen=True)
class DiscountedEstimator(Estimator, ABC):
    """An estimator with a discount per token."""

    gamma: float

    def __post_init__(self) -> None:
        """Refuse a discount outside [0, 1]."""
        require_unit(self, "gamma")


class TotalReturn(DiscountedEstimator):
    """Phi_t = R(tau)."""

    def advantages(self, episodes: Episodes) -> PerToken:
        """R(tau) at each token."""
        return total_return(episodes.rewards, episodes.mask, self.gamma)


class RewardToGo(DiscountedEstimator):
    """Phi_t = G_t: REINFORCE."""

    def advantages(self, episodes: Episodes) -> PerToken:
        """G_t."""
        return reward_to_go(episodes.rewards, episodes.mask, self.gamma)


class BatchMeanBaseline(DiscountedEstimator):
    """Phi_t = G_t - mean of G over the batch."""

    def advantages(self, episodes: Episodes) -> PerToken:
        """G_t minus the mean."""
        return batch_mean_baseline(episodes.rewards, episodes.mask, self.gamma)


class NormalizedReturn(DiscountedEstimator):
    """Phi_t = (G_t - mean) / std over the tokens of the batch: REINFORCE++ (https://arxiv.org/abs/2501.03262)."""

    def advantages(self, episodes: Episodes) -> PerToken:
        """The whitened G_t."""
        return whiten(reward_to_go(episodes.rewards, episodes.mask, self.gamma), episodes.mask)


@dataclass
class RunningMeanBaseline(Estimator):
    """Phi_t = G_t - b, b the decayed mean of G over the batches before this one; 0 in the first.

    Made of the past alone, b is independent of the actions it is compared with, so the gradient stays unbiased.
    """

    gamma: float
    baseline_decay: float
    total: float = field(default=0.0, init=False)
    weight: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """Refuse a discount outside [0, 1] and a decay with which no batch would count."""
        require_unit(self, "gamma")
        require(0 <= self.baseline_decay < 1, "baseline_decay", self.baseline_decay, "at least 0 and less than 1")

    def advantages(self, episodes: Episodes) -> PerToken:
        """G_t minus the running mean."""
        baseline = self.total / self.weight if self.weight else 0.0
        return masked(reward_to_go(episodes.rewards, episodes.mask, self.gamma) - baseline, episodes.mask)

    def update(self, episodes: Episodes) -> None:
        """Add the mean of this batch."""
        mean = masked_mean(reward_to_go(episodes.rewards, episodes.mask, self.gamma), episodes.mask).item()
        self.total = self.baseline_decay * self.total + (1 - self.baseline_decay) * mean
        self.weight = self.baseline_decay * self.weight + (1 - self.baseline_decay)

    def state_dict(self) -> dict[str, Any]:
        """The decayed sum of the means and that of their weights."""
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both sums; 0 where the checkpoint is of an estimator without them."""
        self.total, self.weight = state.get("total", 0.0), state.get("weight", 0.0)


@dataclass(frozen=True)
class CriticEstimator(Estimator, ABC):
    """An estimator that reads values; the critic's target is the lambda-return with `critic_lam`."""

    gamma: float
    critic_lam: float

    needs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a discount or a lambda outside [0, 1]."""
        require_unit(self, "gamma", "critic_lam")

    def returns(self, episodes: Episodes) -> PerToken:
        """The lambda-return."""
        values = require_given(episodes.old_values)
        return lambda_returns(episodes.rewards, values, episodes.mask, self.gamma, self.critic_lam)


class ValueBaseline(CriticEstimator):
    """Phi_t = G_t - V_t."""

    def advantages(self, episodes: Episodes) -> PerToken:
        """G_t minus the value."""
        to_go = reward_to_go(episodes.rewards, episodes.mask, self.gamma)
        return to_go - masked(require_given(episodes.old_values), episodes.mask)


class TDError(CriticEstimator):
    """Phi_t = r_t + gamma V_{t+1} - V_t: the plain actor-critic."""

    def advantages(self, episodes: Episodes) -> PerToken:
        """delta_t."""
        return td_errors(episodes.rewards, require_given(episodes.old_values), episodes.mask, self.gamma)


@dataclass(frozen=True, kw_only=True)
class GAE(CriticEstimator):
    """Phi_t = generalized advantage estimate."""

    lam: float

    def __post_init__(self) -> None:
        """Refuse a discount or a lambda outside [0, 1]."""
        super().__post_init__()
        require_unit(self, "lam")

    def advantages(self, episodes: Episodes) -> PerToken:
        """A_t."""
        return gae(episodes.rewards, require_given(episodes.old_values), episodes.mask, self.gamma, self.lam)


class LeaveOneOut(Estimator):
    """Phi_t = R_i - mean of the other samples of the prompt: RLOO."""

    needs_groups: ClassVar[bool] = True

    def advantages(self, episodes: Episodes) -> PerToken:
        """The same number at each token of a response."""
        returns = masked(episodes.rewards, episodes.mask).sum(dim=1)
        return per_token(leave_one_out(returns, episodes.group_ids), episodes.mask)


@dataclass(frozen=True)
class GroupRelative(Estimator):
    """Phi_t = (R_i - mean of the prompt's samples), over their std when `group_scale`: GRPO, Dr. GRPO."""

    group_scale: bool

    needs_groups: ClassVar[bool] = True

    def advantages(self, episodes: Episodes) -> PerToken:
        """The same number at each token of a response."""
        returns = masked(episodes.rewards, episodes.mask).sum(dim=1)
        return per_token(group_relative(returns, episodes.group_ids, scale=self.group_scale), episodes.mask)


class GreedyBaseline(DiscountedEstimator):
    """Phi_t = G_t - score of the greedy response to the same prompt: ReMax (https://arxiv.org/abs/2310.10505).

    The greedy response's score is shaped like the others', without a KL term.
    """

    needs_greedy: ClassVar[bool] = True

    def advantages(self, episodes: Episodes) -> PerToken:
        """G_t minus the greedy score."""
        to_go = reward_to_go(episodes.rewards, episodes.mask, self.gamma)
        return masked(to_go - require_given(episodes.greedy_scores).unsqueeze(1), episodes.mask)
