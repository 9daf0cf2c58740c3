"""How per-token losses become one number: weights (B, T) such that loss = sum(weights * losses).

Weights are computed once over the whole (global) minibatch and cut into micro-batches afterward. The loss is linear
in them, so micro-batch size, padding and the number of ranks change nothing.
"""

from __future__ import annotations

from src.core.masking import masked
from src.core.shapes import Mask, PerToken, Scalar


def token_mean(mask: Mask) -> PerToken:
    """w_bt = m_bt / sum(m): every token of the minibatch counts the same.

    Shapes: mask (B, T) bool -> (B, T) float; all 0 when no token counts.
    """
    return mask.float() / mask.sum().clamp(min=1)


def sequence_mean(mask: Mask) -> PerToken:
    """w_bt = m_bt / (|m_b| N), N the sequences with a counted token: every response counts the same, as in GRPO.

    Shapes: mask (B, T) bool -> (B, T) float; all 0 when no token counts.
    """
    lengths = mask.sum(dim=1, keepdim=True)
    return mask.float() / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)


def constant_length(mask: Mask, length: int) -> PerToken:
    """w_bt = m_bt / (B length): a sum over each response with a divisor that does not depend on it, as in Dr. GRPO.

    Shapes: mask (B, T) bool, length in tokens -> (B, T) float.
    """
    return mask.float() / (mask.shape[0] * length)


def weighted_sum(x: PerToken, weights: PerToken, mask: Mask) -> Scalar:
    """sum_bt w_bt x_bt over the counted tokens. Shapes: all (B, T), result: scalar."""
    return (masked(x, mask) * weights.to(x.dtype)).sum()
