"""Running moments: batch by batch, as if all numbers had come at once."""

from __future__ import annotations

import math
import statistics
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from src.core.moments import Moments, combined, of_batch

quick = settings(deadline=None, derandomize=True, max_examples=100)
batches = st.lists(st.lists(st.floats(-100, 100), max_size=6), max_size=6)


def tensor(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def taken_in_turn(stream: list[list[float]]) -> Moments:
    return reduce(combined, [of_batch(tensor(batch)) for batch in stream], Moments())


@quick
@given(batches)
def test_any_split_gives_the_moments_of_the_whole(stream: list[list[float]]) -> None:
    """Checklist 21. Mean and unbiased standard deviation by torch over the concatenation; empty batches too."""
    seen = [x for batch in stream for x in batch]
    moments = taken_in_turn(stream)
    assert moments.count == len(seen)
    assert moments.mean == pytest.approx(statistics.fmean(seen) if seen else 0.0, abs=1e-9)
    # from the squares of numbers up to 100: rounding leaves 1e-6 of a spread that is 0
    expected = torch.tensor(seen, dtype=torch.float64).std(unbiased=True).item() if len(seen) > 1 else 1.0
    assert moments.std == pytest.approx(expected, rel=1e-9, abs=1e-5)


@quick
@given(batches, batches)
def test_two_streams_combine_like_one(one: list[list[float]], two: list[list[float]]) -> None:
    """Checklist 21. Whatever was taken in first, and in either order."""
    whole = taken_in_turn(one + two)
    for together in (
        combined(taken_in_turn(one), taken_in_turn(two)),
        combined(taken_in_turn(two), taken_in_turn(one)),
    ):
        assert together.count == whole.count
        assert together.mean == pytest.approx(whole.mean, abs=1e-9)
        assert together.squares == pytest.approx(whole.squares, rel=1e-9, abs=1e-6)


def test_long_streams_of_float32_scores_far_from_zero() -> None:
    """Checklist 21. Sums of squares in float32 would lose every digit at an offset of 1e5."""
    scores = 1e5 + torch.randn(4096, generator=torch.Generator().manual_seed(0))
    moments = reduce(combined, [of_batch(batch) for batch in scores.split(64)], Moments())
    assert_close(torch.tensor(moments.mean, dtype=torch.float64), scores.double().mean())
    assert_close(torch.tensor(moments.std, dtype=torch.float64), scores.double().std(unbiased=True))


@pytest.mark.parametrize("seen", [[], [3.0]])
def test_less_than_two_numbers_have_no_spread(seen: list[float]) -> None:
    """Checklist 41. Then the unit stays 1, so that dividing by it changes nothing."""
    assert taken_in_turn([seen]).std == 1.0


def test_two_numbers_by_hand() -> None:
    """Checklist 21. Divided by n - 1: 1 and 4 are sqrt(4.5) apart from their mean 2.5."""
    moments = combined(of_batch(tensor([1.0])), of_batch(tensor([4.0])))
    assert (moments.count, moments.mean, moments.squares) == (2.0, 2.5, 4.5)
    assert moments.std == pytest.approx(math.sqrt(4.5))
