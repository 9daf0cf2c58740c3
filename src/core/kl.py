"""Per-token estimates of KL(p || q) from samples of p (http://joschu.net/blog/kl-approx.html), in nats.

With d = log p(a) - log q(a), a ~ p:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d.
E[k1] = E[k3] = KL; k2 and k3 are never negative. All shapes (B, T).
"""

from __future__ import annotations

from torch import Tensor


def k1(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """d = log p - log q: unbiased, may be negative; its sum over a sequence is the sampled log-ratio."""
    return logprobs - other_logprobs


def k2(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased and low in variance; its gradient is the gradient of the KL in expectation."""
    return 0.5 * (logprobs - other_logprobs).square()


def k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative."""
    difference = logprobs - other_logprobs
    return (-difference).expm1() + difference
