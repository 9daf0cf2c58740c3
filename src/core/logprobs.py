"""Log-probabilities and entropies of a softmax policy, in nats and in float32 or better."""

from __future__ import annotations

import torch

from src.core.shapes import AnyFloat, AnyIds, PerWord


def _scaled(logits: PerWord, temperature: float) -> PerWord:
    return (logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits) / temperature


def normalized_logits(logits: PerWord, temperature: float = 1.0) -> PerWord:
    """log pi(v) = z_v - logsumexp(z), z = logits / temperature. Shapes: (..., V) -> (..., V) nats."""
    return _scaled(logits, temperature).log_softmax(dim=-1)


def logprobs_from_logits(logits: PerWord, ids: AnyIds, temperature: float = 1.0) -> AnyFloat:
    """log pi(a) = z_a - logsumexp(z), z = logits / temperature.

    Shapes: logits (..., V), ids (...) int64 -> (...) nats. Half-precision logits are raised to float32 first.
    """
    scaled = _scaled(logits, temperature)
    return scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(dim=-1)


def entropy_from_logits(logits: PerWord, temperature: float = 1.0) -> AnyFloat:
    """H = logsumexp(z) - sum_v softmax(z)_v z_v, z = logits / temperature. Shapes: (..., V) -> (...) nats."""
    scaled = _scaled(logits, temperature)
    finite = scaled.masked_fill(scaled.isneginf(), 0)  # a forbidden token has probability 0 and adds nothing
    return scaled.logsumexp(dim=-1) - (scaled.softmax(dim=-1) * finite).sum(dim=-1)
