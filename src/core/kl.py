"""KL(p || q) between token distributions, in nats: estimated from samples of p, or exact over the vocabulary.

With d = log p(a) - log q(a), a ~ p:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d.
E[k1] = E[k3] = KL; k2 and k3 are never negative. Source: http://joschu.net/blog/kl-approx.html.

As a *loss*, differentiated with respect to p, they differ: the gradient of k1 is zero in expectation, that of k2 is the
gradient of KL(p || q), that of k3 is the gradient of KL(q || p). As a *reward* they act through the sampled token
alone, with the gradient E[grad log p(a) k(a)]: for k1 this is the gradient of KL(p || q); for the exact KL it is 0, as
that is the same number for every token. The two gradients of an unbiased estimator add up to that of the KL
(docs/objectives.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from src.core.shapes import AnyFloat, PerToken, PerWord


def k1(logprobs: AnyFloat, other_logprobs: AnyFloat) -> AnyFloat:
    """d = log p - log q: unbiased, may be negative; its sum over a sequence is the sampled log-ratio. Shapes: any."""
    return logprobs - other_logprobs


def k2(logprobs: AnyFloat, other_logprobs: AnyFloat) -> AnyFloat:
    """d^2 / 2: biased and low in variance; its gradient is the gradient of the KL in expectation. Shapes: any."""
    return 0.5 * (logprobs - other_logprobs).square()


def k3(logprobs: AnyFloat, other_logprobs: AnyFloat) -> AnyFloat:
    """exp(-d) - 1 + d: unbiased and never negative. Shapes: any."""
    difference = logprobs - other_logprobs
    return (-difference).expm1() + difference


def categorical_kl(log_p: PerWord, log_q: PerWord) -> AnyFloat:
    """KL(p || q) = sum_v p_v (log p_v - log q_v); a token that p forbids adds nothing. Shapes: (..., V) -> (...)."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, torch.zeros_like(p))).sum(dim=-1)


@dataclass(frozen=True)
class SampledKL:
    """KL per token from the sampled tokens alone, by k1, k2 or k3."""

    estimator: Callable[[PerToken, PerToken], PerToken]

    @property
    def is_log_ratio(self) -> bool:
        """Whether it is k1, which alone may be a reward without being part of the loss."""
        return getattr(self.estimator, "func", self.estimator) is k1

    def __call__(self, logprobs: PerToken, other_logprobs: PerToken, exact: Callable[[], PerToken]) -> PerToken:
        """The estimate, (B, T); `exact` is not called."""
        return self.estimator(logprobs, other_logprobs)


@dataclass(frozen=True)
class ExactKL:
    """KL per token over the whole vocabulary: no sampling noise, at the price of both distributions."""

    is_log_ratio: ClassVar[bool] = False

    def __call__(self, logprobs: PerToken, other_logprobs: PerToken, exact: Callable[[], PerToken]) -> PerToken:
        """What `exact` computes, (B, T)."""
        return exact()


KLEstimator = SampledKL | ExactKL
