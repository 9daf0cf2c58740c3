"""Samples of one prompt compared with each other: RLOO, GRPO and what they are made of."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from src.core.advantages import group_relative, group_sum, groups, leave_one_out, per_token

quick = settings(deadline=None, derandomize=True, max_examples=60)
# rows of (score, id of the group): groups of any size, in any order, with ids that are no indices
IDS = st.sampled_from([-7, 0, 3, 2**40])
batches = st.lists(st.tuples(st.floats(-9, 9), IDS), min_size=1, max_size=9)

Batch = list[tuple[float, int]]


def as_tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor([score for score, _ in batch], dtype=torch.float64),
        torch.tensor([group for _, group in batch], dtype=torch.int64),
    )


def members(batch: Batch, group: int) -> list[float]:
    return [score for score, other in batch if other == group]


@pytest.fixture
def interleaved() -> tuple[Tensor, Tensor]:
    """Groups of four, three and two, one row of each in turn."""
    ids = torch.tensor([5, -1, 99, 5, -1, 99, 5, -1, 5])
    return torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), ids


@quick
@given(st.lists(IDS, min_size=1, max_size=9))
def test_groups_are_numbered_whatever_their_ids(ids: list[int]) -> None:
    """The same number for the same id, other numbers for others, from 0 without a gap."""
    number = groups(torch.tensor(ids)).tolist()
    assert sorted(set(number)) == list(range(len(set(ids))))
    assert all((number[i] == number[j]) == (ids[i] == ids[j]) for i in range(len(ids)) for j in range(len(ids)))


@quick
@given(batches)
def test_group_sum_by_loop(batch: Batch) -> None:
    scores, ids = as_tensors(batch)
    expected = [sum(members(batch, group)) for _, group in batch]
    assert_close(group_sum(scores, ids), torch.tensor(expected, dtype=torch.float64))


@quick
@given(batches)
def test_leave_one_out_by_loop(batch: Batch) -> None:
    """R_i - mean of the others in the group; 0 for a row by itself."""
    expected = []
    for i, (score, group) in enumerate(batch):
        others = [other for j, (other, its) in enumerate(batch) if its == group and j != i]
        expected.append(score - statistics.fmean(others) if others else 0.0)
    assert_close(leave_one_out(*as_tensors(batch)), torch.tensor(expected, dtype=torch.float64))


def test_leave_one_out_is_the_centered_score_enlarged(interleaved: tuple[Tensor, Tensor]) -> None:
    """R_i - mean_{j != i} R_j = G / (G - 1) (R_i - mean R), which sums to 0 over each group."""
    scores, ids = interleaved
    actual = leave_one_out(scores, ids)
    for group in ids.unique():
        of_group = scores[ids == group]
        size = len(of_group)
        assert_close(actual[ids == group], size / (size - 1) * (of_group - of_group.mean()))
        assert_close(actual[ids == group].sum(), torch.tensor(0.0, dtype=torch.float64))


def test_leave_one_out_is_made_of_group_relative(interleaved: tuple[Tensor, Tensor]) -> None:
    """RLOO and Dr. GRPO point the same way and differ by the factor G / (G - 1)."""
    scores, ids = interleaved
    size = group_sum(torch.ones_like(scores), ids)
    assert_close(leave_one_out(scores, ids), size / (size - 1) * group_relative(scores, ids, scale=False))


@quick
@given(batches)
def test_group_relative_by_loop(batch: Batch) -> None:
    """The centered score; divided by the unbiased standard deviation + 1e-6; 0 where all of a group are equal."""
    scores, ids = as_tensors(batch)
    centered, scaled = [], []
    for score, group in batch:
        same = members(batch, group)
        equal = min(same) == max(same)
        centered.append(0.0 if equal else score - statistics.fmean(same))
        scaled.append(0.0 if equal else centered[-1] / (statistics.stdev(same) + 1e-6))
    assert_close(group_relative(scores, ids, scale=False), torch.tensor(centered, dtype=torch.float64))
    assert_close(group_relative(scores, ids, scale=True), torch.tensor(scaled, dtype=torch.float64))


def test_moments_of_each_group(interleaved: tuple[Tensor, Tensor]) -> None:
    """Scaled: mean 0 and unbiased standard deviation s / (s + 1e-6), which is 1 but for the constant."""
    scores, ids = interleaved
    actual = group_relative(scores, ids, scale=True)
    for group in ids.unique():
        spread = scores[ids == group].std(unbiased=True)
        assert_close(actual[ids == group].mean(), torch.tensor(0.0, dtype=torch.float64))
        assert_close(actual[ids == group].std(unbiased=True), spread / (spread + 1e-6))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("score", [0.1, 0.7, -3.3, 1e4 / 3])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_give_exactly_nothing(score: float, size: int, scale: bool, dtype: torch.dtype) -> None:
    """The mean of three times 0.1 is not 0.1; divided by a spread of 1e-17, that would be an advantage."""
    scores, ids = torch.full((size,), score, dtype=dtype), torch.full((size,), 4)
    assert group_relative(scores, ids, scale=scale).tolist() == [0.0] * size
    assert leave_one_out(scores, ids).tolist() == [0.0] * size


def test_rounding_alone_tells_no_rows_apart() -> None:
    """In float32 the mean of six times 3.3333 is another number, of which whitening would make advantages around 1."""
    scores, ids = torch.full((7,), 3.3333), torch.zeros(7, dtype=torch.int64)
    by_loop = scores[0] - (scores.sum() - scores[0]) / 6
    assert by_loop != 0
    assert leave_one_out(scores, ids).tolist() == [0.0] * 7


def test_equal_groups_beside_unequal_ones() -> None:
    """Each group is judged by itself: the equal one stays at 0, the singleton too, the third learns."""
    scores, ids = torch.tensor([0.1, 1.0, 0.1, 8.0, 3.0, 0.1]), torch.tensor([2, 9, 2, 7, 9, 2])
    assert group_relative(scores, ids, scale=False).tolist() == [0.0, -1.0, 0.0, 0.0, 1.0, 0.0]
    assert_close(
        group_relative(scores, ids, scale=True), torch.tensor([0.0, -0.5**0.5, 0.0, 0.0, 0.5**0.5, 0.0]), atol=1e-6,
        rtol=0,  # the constant in the divisor
    )  # fmt: skip
    assert_close(leave_one_out(scores, ids), torch.tensor([0.0, -2.0, 0.0, 0.0, 2.0, 0.0]))


@pytest.mark.parametrize("scale", [True, False])
def test_rows_may_come_in_any_order(interleaved: tuple[Tensor, Tensor], scale: bool) -> None:
    """The advantages move with their rows, and other names of the groups change nothing."""
    scores, ids = interleaved
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    renamed = -11 * ids + 1
    for function in (leave_one_out, lambda s, g: group_relative(s, g, scale=scale)):
        assert_close(function(scores[order], renamed[order]), function(scores, ids)[order])


def test_a_constant_of_the_prompt_changes_nothing(interleaved: tuple[Tensor, Tensor]) -> None:
    """An easy prompt is no merit; with the scale neither is a large unit of the score."""
    scores, ids = interleaved
    shifted = scores + 3.0 * ids
    assert_close(leave_one_out(shifted, ids), leave_one_out(scores, ids))
    assert_close(group_relative(shifted, ids, scale=False), group_relative(scores, ids, scale=False))
    # up to the constant 1e-6 beside the standard deviation
    one_unit, another = group_relative(scores, ids, scale=True), group_relative(50 * scores, ids, scale=True)
    assert_close(one_unit, another, rtol=1e-5, atol=0)


def test_per_token_gives_each_counted_token_the_number_of_its_row() -> None:
    """Checklist 11 and Checklist 12."""
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    actual = per_token(torch.tensor([2.0, 5.0, -1.0]), mask)
    assert_close(actual, torch.tensor([[2.0, 0.0, 2.0], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]]))
