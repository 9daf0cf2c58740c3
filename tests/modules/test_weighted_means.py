"""Means over ragged pieces."""

from __future__ import annotations

import pytest
import torch

from src.modules.weighted_means import WeightedMeans


def test_averages_of_ragged_pieces_are_those_of_the_whole() -> None:
    """Checklist 47, 30."""
    values, mask = torch.randn(6, 4), torch.rand(6, 4) > 0.4
    whole, pieces, part = WeightedMeans(), WeightedMeans(), WeightedMeans()
    whole.add_tokens("x", values, mask)
    pieces.add_tokens("x", values[:1], mask[:1])
    part.add_tokens("x", values[1:].masked_fill(~mask[1:], float("nan")), mask[1:])
    pieces.merge(part)
    assert pieces.compute()["x"] == pytest.approx(values[mask].mean().item(), abs=1e-6)
    assert whole.compute() == pytest.approx(pieces.compute(), abs=1e-6)
    assert WeightedMeans().compute() == {}


def test_one_number_may_stand_for_many() -> None:
    """A mean of 3 over four elements and of 8 over one are one of 4; a number of nothing is left out."""
    means = WeightedMeans()
    means.add("x", 3.0, 4)
    means.add("x", torch.tensor(8.0))
    means.add("empty", float("nan"), 0)
    means.add_tokens("empty too", torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert means.compute() == {"x": 4.0}
    assert means.over_ranks().compute() == {"x": 4.0}  # in one process these are all
