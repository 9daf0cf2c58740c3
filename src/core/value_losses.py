"""Losses of the critic, per token: 0.5 (V_t - R_t)^2, plain or clipped around the values at rollout time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from src.core.masking import masked
from src.core.shapes import Mask, PerToken
from src.errors import require


def squared_error(values: PerToken, returns: PerToken, mask: Mask) -> PerToken:
    """L_t = 0.5 (V_t - R_t)^2. Shapes: all (B, T)."""
    return 0.5 * masked(values - returns, mask).square()


def clipped_squared_error(
    values: PerToken, old_values: PerToken, returns: PerToken, mask: Mask, value_clip: float
) -> tuple[PerToken, PerToken]:
    """L_t = 0.5 max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, +-value_clip) - R_t)^2).

    Source: OpenAI baselines' ppo2, detail 9 of "The 37 implementation details of PPO"
    (https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/).
    Shapes: all (B, T); also returns the indicator of where clipping changed the loss.
    """
    unclipped = squared_error(values, returns, mask)
    near_old = old_values + (values - old_values).clamp(-value_clip, value_clip)
    clipped = squared_error(near_old, returns, mask)
    moved_too_far = (values - old_values).abs() > value_clip  # else the two differ by rounding alone
    return torch.maximum(unclipped, clipped), ((clipped > unclipped) & moved_too_far).to(unclipped)


@dataclass(frozen=True)
class SquaredError:
    """Plain regression on the returns."""

    def __call__(
        self, values: PerToken, old_values: PerToken, returns: PerToken, mask: Mask
    ) -> tuple[PerToken, PerToken]:
        """Return the loss of each token and the indicator of clipping (always 0), each (B, T)."""
        loss = squared_error(values, returns, mask)
        return loss, torch.zeros_like(loss)


@dataclass(frozen=True)
class ClippedSquaredError:
    """Regression on the returns that gains nothing from moving further than `value_clip` at a time."""

    value_clip: float

    def __post_init__(self) -> None:
        """Refuse an empty range."""
        require(self.value_clip > 0, "value_clip", self.value_clip, "greater than 0")

    def __call__(
        self, values: PerToken, old_values: PerToken, returns: PerToken, mask: Mask
    ) -> tuple[PerToken, PerToken]:
        """Return the loss of each token and the indicator of clipping, each (B, T)."""
        return clipped_squared_error(values, old_values, returns, mask, self.value_clip)
