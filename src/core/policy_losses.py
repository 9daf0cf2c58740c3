"""Policy losses per token; loss = -objective, so that descent on the loss is ascent on the objective.

Each is a pure function of logprobs, old_logprobs and advantages, all (B, T), returning the loss of each token (B, T)
and indicators to average, plus a small frozen object with its settings. `src.core.aggregation` averages over tokens;
every function first sets to 0 what lies outside the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from src.core.masking import masked
from src.core.shapes import Mask, PerToken
from src.errors import require

# exp(20) is far outside any trust region: the clamp only keeps a runaway ratio finite
MAX_LOG_RATIO = 20.0

TokenLoss = tuple[PerToken, dict[str, PerToken]]


def probability_ratio(logprobs: PerToken, old_logprobs: PerToken, mask: Mask) -> PerToken:
    """rho_t = pi(a_t|s_t) / pi_old(a_t|s_t), the log-ratio clamped to +-20; 1 outside the mask. Shapes: (B, T)."""
    return masked(logprobs - old_logprobs, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def reinforce(logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> TokenLoss:
    """L_t = -A_t log pi(a_t|s_t): the policy gradient itself, however far the policy has moved.

    Source: Williams 1992 (https://doi.org/10.1007/BF00992696). Shapes: all (B, T).
    """
    return -masked(advantages, mask) * masked(logprobs, mask), {}


def surrogate(logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> TokenLoss:
    """L_t = -rho_t A_t: what TRPO maximizes within a bound on KL(old || new), PPO-penalty less a multiple of it.

    Source: TRPO, eq. 14 (https://arxiv.org/abs/1502.05477). Shapes: all (B, T).
    """
    return -probability_ratio(logprobs, old_logprobs, mask) * masked(advantages, mask), {}


def clipped_surrogate(
    logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask, clip_low: float, clip_high: float
) -> TokenLoss:
    """L_t = max(-rho_t A_t, -clip(rho_t, 1 - clip_low, 1 + clip_high) A_t).

    Source: PPO, eq. 7 (https://arxiv.org/abs/1707.06347). Where the clipped term is the larger the gradient is 0.
    Shapes: all (B, T). Indicator `clip_fraction`: 1 where clipping changed the loss.
    """
    return _clip(probability_ratio(logprobs, old_logprobs, mask), masked(advantages, mask), clip_low, clip_high)


def dual_clipped_surrogate(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    mask: Mask,
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


def sequence_clipped_surrogate(
    logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask, clip_low: float, clip_high: float
) -> TokenLoss:
    """L_t = max(-s_t A_t, -clip(s_t, 1 - clip_low, 1 + clip_high) A_t),  s_t = sg[s / pi_t] pi_t.

    log s = mean_t log rho_t, sg[.] a constant to the gradient.
    One ratio s for the whole response, so a response is clipped as a whole; written per token (GSPO-token), its
    gradient is that of GSPO when A is the same at each token and responses are averaged by `sequence_mean`.
    Source: GSPO, eq. 13 (https://arxiv.org/abs/2507.18071). Shapes: all (B, T).
    """
    log_ratio = masked(logprobs - old_logprobs, mask)
    mean = log_ratio.detach().sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    through_token = mean + masked(logprobs - logprobs.detach(), mask)  # the value of the mean, the token's own gradient
    return _clip(
        through_token.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), masked(advantages, mask), clip_low, clip_high
    )


def clipped_weight(
    logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask, clip_low: float, clip_high: float
) -> TokenLoss:
    """L_t = -sg[clip(rho_t, 1 - clip_low, 1 + clip_high)] A_t log pi(a_t|s_t).

    Clipping limits a token's weight; no token loses its gradient.
    Source: CISPO, eq. 4 (https://arxiv.org/abs/2506.13585). Shapes: all (B, T). Indicator `clip_fraction`: 1 where the
    weight was clipped.
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask).detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -weight * masked(advantages, mask) * masked(logprobs, mask)
    return loss, {"clip_fraction": (weight != ratio).to(ratio)}


def _clip(ratio: PerToken, advantages: PerToken, clip_low: float, clip_high: float) -> TokenLoss:
    """max(-ratio A, -clip(ratio) A), and where the second is the larger."""
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(unclipped, clipped), {"clip_fraction": (clipped > unclipped).to(ratio)}


@dataclass(frozen=True)
class Reinforce:
    """The plain policy gradient."""

    def __call__(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> TokenLoss:
        """Return the loss of each token, (B, T); there is nothing to indicate."""
        return reinforce(logprobs, old_logprobs, advantages, mask)


@dataclass(frozen=True)
class Surrogate:
    """The importance-weighted policy gradient."""

    def __call__(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> TokenLoss:
        """Return the loss of each token, (B, T); there is nothing to indicate."""
        return surrogate(logprobs, old_logprobs, advantages, mask)


@dataclass(frozen=True)
class ClippedSurrogate:
    """PPO-clip."""

    clip_low: float
    clip_high: float

    def __post_init__(self) -> None:
        """Refuse an empty trust region and a ratio below 0."""
        require(0 < self.clip_low < 1, "clip_low", self.clip_low, "greater than 0 and less than 1")
        require(self.clip_high > 0, "clip_high", self.clip_high, "greater than 0")

    def __call__(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> TokenLoss:
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

    def __call__(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> TokenLoss:
        """Return the loss of each token and the indicators, each (B, T)."""
        return dual_clipped_surrogate(
            logprobs, old_logprobs, advantages, mask, self.clip_low, self.clip_high, self.dual_clip
        )


class SequenceClippedSurrogate(ClippedSurrogate):
    """GSPO: one ratio per response."""

    def __call__(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> TokenLoss:
        """Return the loss of each token and the indicators, each (B, T)."""
        return sequence_clipped_surrogate(logprobs, old_logprobs, advantages, mask, self.clip_low, self.clip_high)


@dataclass(frozen=True)
class ClippedWeight:
    """CISPO: the importance weight is clipped and every token keeps its gradient."""

    clip_low: float
    clip_high: float

    def __post_init__(self) -> None:
        """Refuse an empty range and a weight below 0."""
        require(0 < self.clip_low <= 1, "clip_low", self.clip_low, "greater than 0 and at most 1")
        require(self.clip_high > 0, "clip_high", self.clip_high, "greater than 0")

    def __call__(self, logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask) -> TokenLoss:
        """Return the loss of each token and the indicators, each (B, T)."""
        return clipped_weight(logprobs, old_logprobs, advantages, mask, self.clip_low, self.clip_high)
