"""Importance weights w of responses that another policy sampled, so that they count as those of pi_old.

E_behavior[w f] = E_old[f] for w = pi_old / pi_behavior of the whole response. The ratio of a token alone leaves out
those of the tokens before it: less variance, some bias. Both are bounded, at the price of more bias. The policy loss
of each token is multiplied by its weight, a constant to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from src.core.masking import masked
from src.core.policy_losses import MAX_LOG_RATIO, probability_ratio
from src.core.shapes import Mask, PerToken, Scalar
from src.errors import require

Ratio = Callable[[PerToken, PerToken, Mask], PerToken]


def sequence_ratio(logprobs: PerToken, other_logprobs: PerToken, mask: Mask) -> PerToken:
    """prod_t pi(a_t|s_t) / pi_other(a_t|s_t), the same at each token of a response; its log clamped to +-20.

    1 outside the mask, as `probability_ratio`, which is that of each token. Shapes: (B, T).
    """
    total = masked(logprobs - other_logprobs, mask).sum(dim=1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return masked(total.expand_as(logprobs), mask).exp()


def effective_sample_size(weights: PerToken, mask: Mask) -> Scalar:
    """(sum w)^2 / (n sum w^2) over the n counted tokens: 1 if all weigh the same, 1 / n if one alone counts; 0 if none.

    Source: Kish 1965, Survey Sampling. Shapes: (B, T) -> scalar.
    """
    w = masked(weights, mask)
    return w.sum().square() / (mask.sum() * w.square().sum()).clamp(min=1e-30)


@dataclass(frozen=True)
class Truncated:
    """w = min(ratio, cap).

    Source: Ionides 2008 (https://doi.org/10.1198/106186008X320456); for language models TIS
    (https://fengyao.notion.site/off-policy-rl), as in TRL, verl and OpenRLHF.
    """

    cap: float
    ratio: Ratio = probability_ratio

    def __post_init__(self) -> None:
        """Refuse a cap below the weight of what pi_old itself samples."""
        require(self.cap > 1, "cap", self.cap, "greater than 1")

    def __call__(self, old_logprobs: PerToken, behavior_logprobs: PerToken, mask: Mask) -> tuple[PerToken, PerToken]:
        """The weights, 0 outside the mask, and 1 where they are not the ratio. Shapes: all (B, T)."""
        ratio = masked(self.ratio(old_logprobs, behavior_logprobs, mask), mask)
        weights = self._bounded(ratio)
        return weights, (weights != ratio).to(ratio)

    def _bounded(self, ratio: PerToken) -> PerToken:
        return ratio.clamp(max=self.cap)


class Masked(Truncated):
    """w = ratio where 1 / cap <= ratio <= cap, else 0: what is far from pi_old is not learned from.

    Source: IcePop (https://arxiv.org/abs/2510.18855) for tokens, masked importance sampling
    (https://richardli.xyz/rl-collapse) for whole responses; the interval is that of verl.
    """

    def _bounded(self, ratio: PerToken) -> PerToken:
        return masked(ratio, (ratio >= 1 / self.cap) & (ratio <= self.cap))
