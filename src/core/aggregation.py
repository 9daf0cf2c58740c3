"""How per-token losses become one number: weights (B, T) such that loss = sum(weights * losses).

Weights are computed once over the whole (global) minibatch and cut into micro-batches afterwards. The loss is linear
in them, so micro-batch size, padding and the number of ranks change nothing.
"""

from __future__ import annotations

from torch import Tensor

from src.core.masking import masked


def token_mean(mask: Tensor) -> Tensor:
    """w_bt = m_bt / sum(m): every token of the minibatch counts the same.

    Shapes: mask (B, T) bool -> (B, T) float; all 0 when no token counts.
    """
    return mask.float() / mask.sum().clamp(min=1)


def weighted_sum(x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """sum_bt w_bt x_bt over the counted tokens. Shapes: all (B, T), result: scalar."""
    return (masked(x, mask) * weights.to(x.dtype)).sum()
