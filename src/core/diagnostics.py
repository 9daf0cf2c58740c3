"""Numbers that tell whether learning is healthy."""

from __future__ import annotations

import torch
from torch import Tensor

from src.core.masking import masked_mean, masked_variance


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the counted tokens; 0 where the returns do not vary. Shapes: (B, T) -> scalar.

    1: the critic predicts perfectly; 0: no better than a constant; below 0: worse. Returns whose standard deviation is
    below 1e-5 of their root mean square differ by rounding only and count as constant.
    """
    variance = masked_variance(returns, mask)
    varies = variance > 1e-10 * masked_mean(returns.square(), mask)
    return torch.where(varies, 1 - masked_variance(returns - values, mask) / variance, torch.zeros_like(variance))
