"""Means over pieces of different sizes: sums and counts are added up and divided once, at the end."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from src.utils.distributed import gather


class WeightedMeans:
    """Weighted means of named numbers, updated incrementally."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    def add(self, name: str, value: Tensor | float, count: float = 1.0) -> None:
        """Add one number that stands for `count` elements."""
        self._sums[name] += float(value) * count
        self._counts[name] += count

    def add_tokens(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add the counted elements of `values`; both (B, T)."""
        self._sums[name] += float(torch.where(mask, values.detach(), 0).sum())
        self._counts[name] += float(mask.sum())

    def merge(self, other: WeightedMeans) -> None:
        """Add the sums and counts of `other`."""
        for name, total in other._sums.items():
            self._sums[name] += total
            self._counts[name] += other._counts[name]

    def over_ranks(self) -> WeightedMeans:
        """The sums and counts of all ranks together."""
        whole = WeightedMeans()
        for own in gather(self):
            whole.merge(own)
        return whole

    def compute(self) -> dict[str, float]:
        """The means, by name; names without any element are left out."""
        return {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
