"""Policy losses per token; loss = -objective, so that descent on the loss is ascent on the objective.

Each is a pure function of logprobs, old_logprobs and advantages, all (B, T), returning the loss of each token (B, T)
and indicators to average, plus a small frozen object that holds its settings. How tokens are averaged is
`src.core.aggregation`'s business; every function zeroes what lies outside the mask at its door.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from src.core.checks import require
from src.core.masking import masked

# exp(20) is far outside any trust region: the clamp only keeps a runaway ratio finite
MAX_LOG_RATIO = 20.0

TokenLoss = tuple[Tensor, dict[str, Tensor]]


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """rho_t = pi(a_t|s_t) / pi_old(a_t|s_t), the log-ratio clamped to +-20; 1 outside the mask. Shapes: (B, T)."""
    return masked(logprobs - old_logprobs, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> TokenLoss:
    """L_t = max(-rho_t A_t, -clip(rho_t, 1 - clip_low, 1 + clip_high) A_t).

    Source: PPO, eq. 7 (https://arxiv.org/abs/1707.06347). Where the clipped term is the larger the gradient is 0.
    Shapes: all (B, T). Indicator `clip_fraction`: 1 where clipping changed the loss.
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    advantages = masked(advantages, mask)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(unclipped, clipped), {"clip_fraction": (clipped > unclipped).to(ratio)}


def dual_clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> TokenLoss:
    """L_t = min(L_t^clip, -c A_t) where A_t < 0, else L_t^clip: a bound on how much one bad action can push.

    Source: Ye et al., eq. 5 (https://arxiv.org/abs/1912.09729). Shapes: all (B, T). Indicator `dual_clip_fraction`: 1
    where the second bound changed the loss.
    """
    loss, stats = clipped_surrogate(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
    advantages = masked(advantages, mask)
    bound = -dual_clip * advantages
    bounded = (advantages < 0) & (bound < loss)
    return torch.where(bounded, bound, loss), stats | {"dual_clip_fraction": bounded.to(loss)}


@dataclass(frozen=True)
class ClippedSurrogate:
    """PPO-clip."""

    clip_low: float
    clip_high: float

    def __post_init__(self) -> None:
        """Refuse an empty trust region and a ratio below 0."""
        require(0 < self.clip_low < 1, "clip_low", self.clip_low, "greater than 0 and less than 1")
        require(self.clip_high > 0, "clip_high", self.clip_high, "greater than 0")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        """Return the loss of each token and the indicators, each (B, T)."""
        return clipped_surrogate(logprobs, old_logprobs, advantages, mask, self.clip_low, self.clip_high)


@dataclass(frozen=True)
class DualClippedSurrogate(ClippedSurrogate):
    """PPO-clip with a second bound for negative advantages."""

    dual_clip: float

    def __post_init__(self) -> None:
        """Refuse a second bound inside the first."""
        super().__post_init__()
        require(self.dual_clip > 1 + self.clip_high, "dual_clip", self.dual_clip, "greater than 1 + clip_high")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        """Return the loss of each token and the indicators, each (B, T)."""
        return dual_clipped_surrogate(
            logprobs, old_logprobs, advantages, mask, self.clip_low, self.clip_high, self.dual_clip
        )
