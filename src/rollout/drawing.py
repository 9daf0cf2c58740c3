"""Drawing a token by inverting the cumulative distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256  # probabilities per block; blocks are summed first, then only one per row in float64


def inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """The first index a with p_0 + ... + p_a > u (p_0 + ... + p_V), which is drawn with probability p_a / sum(p).

    Source: Devroye, "Non-Uniform Random Variate Generation" (1986), chapter III.2. A probability of 0 is never drawn.
    torch.multinomial draws as many random numbers as there are probabilities, which takes ten times as long.
    Shapes: p (B, V), u (B,) float64 in [0, 1) -> (B,) int64.
    """
    blocks = pad(p, (0, -p.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(dim=-1).double()
    block, rest = _first_beyond(sums, u.unsqueeze(1) * sums.sum(dim=1, keepdim=True))
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK)).squeeze(1).double()
    index = block * BLOCK + _first_beyond(inside, rest)[0]
    return index.squeeze(1).clamp(max=p.shape[1] - 1)  # with NaN the index would be in the padding


def _first_beyond(weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first index (B, 1) where cumsum(weights (B, N)) exceeds x (B, 1), and x minus the sum before that index."""
    ends = weights.cumsum(dim=1)
    total = ends[:, -1:]
    x = x.minimum(total.nextafter(torch.zeros_like(total)))  # rounding must not give an index beyond the last
    index = torch.searchsorted(ends, x, right=True).clamp(max=weights.shape[1] - 1)  # NaN gives an index beyond
    return index, x - (ends - weights).gather(1, index)
