"""Numbers that show whether learning is healthy."""

from __future__ import annotations

import torch

from src.core.masking import masked_mean, masked_variance
from src.core.shapes import Mask, PerBin, PerToken, Row, Scalar


def explained_variance(values: PerToken, returns: PerToken, mask: Mask) -> Scalar:
    """1 - Var(R - V) / Var(R) over the counted tokens; 0 where the returns do not vary. Shapes: (B, T) -> scalar.

    1: the critic predicts perfectly; 0: no better than a constant; below 0: worse. Returns whose standard deviation is
    below 1e-5 of their root mean square differ by rounding only and count as constant.
    """
    variance = masked_variance(returns, mask)
    varies = variance > 1e-10 * masked_mean(returns.square(), mask)
    return torch.where(varies, 1 - masked_variance(returns - values, mask) / variance, torch.zeros_like(variance))


def correlation(x: Row, y: Row) -> Scalar:
    """Pearson's r = Cov(x, y) / (sd(x) sd(y)); 0 where one of them does not vary. Shapes: (N,), (N,) -> scalar."""
    x, y = x - x.mean(), y - y.mean()
    scale = x.norm() * y.norm()
    return torch.where(scale > 0, (x * y).sum() / scale.clamp(min=torch.finfo(x.dtype).tiny), torch.zeros_like(scale))


def calibration(margins: Row, bins: int) -> tuple[PerBin, PerBin, PerBin]:
    """How sure a reward model is of the order of a pair, and how often it is right, by bins of equal width.

    p = sigmoid(|margin|), the probability it gives to its own order, from 0.5 to 1; right where margin > 0, half right
    at 0. Shapes: margins r_w - r_l (N,) -> mean p, share right and number of pairs of each bin, (bins,); 0 where empty.
    """
    p = margins.abs().sigmoid()
    index = ((p - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    count = torch.zeros(bins, dtype=margins.dtype).index_add(0, index, torch.ones_like(p))
    right = 0.5 * (1 + margins.sign())
    means = [torch.zeros_like(count).index_add(0, index, x) / count.clamp(min=1) for x in (p, right)]
    return means[0], means[1], count


def calibration_error(margins: Row, bins: int = 10) -> Scalar:
    """sum over bins of n_b / N |mean p_b - share right_b|: the expected calibration error.

    Source: Guo et al., eq. 3 (https://arxiv.org/abs/1706.04599). Shapes: (N,) -> scalar.
    """
    sure, right, count = calibration(margins, bins)
    return ((sure - right).abs() * count).sum() / count.sum().clamp(min=1)
