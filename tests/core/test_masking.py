"""Masks: sums and moments over what counts, positions, and where a response ends."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from src.core.masking import (
    first_counted,
    last_counted,
    masked,
    masked_mean,
    masked_variance,
    position_ids,
    until_first_stop,
    whiten,
    whitening_scale,
)

STOP, OTHER_STOP, PAD = 7, 8, 0

quick = settings(deadline=None, derandomize=True, max_examples=60)
numbers = st.floats(-100, 100)


@st.composite
def counted_elements(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[float]]:
    """A matrix, a mask of any form (rows without a counted element too) and the list of the counted elements."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    x = [draw(st.lists(numbers, min_size=columns, max_size=columns)) for _ in range(rows)]
    mask = [draw(st.lists(st.booleans(), min_size=columns, max_size=columns)) for _ in range(rows)]
    counted = [x[i][j] for i in range(rows) for j in range(columns) if mask[i][j]]
    return torch.tensor(x, dtype=torch.float64), torch.tensor(mask), counted


def every_mask(columns: int) -> Tensor:
    """All 2^columns masks of one row, one below the other."""
    return torch.cartesian_prod(*[torch.tensor([False, True])] * columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_masked_keeps_what_counts_and_the_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 2], [3, 4]], dtype=dtype)
    assert_close(masked(x, torch.tensor([[True, False], [False, True]])), torch.tensor([[1, 0], [0, 4]], dtype=dtype))


@quick
@given(counted_elements())
def test_masked_mean_is_the_mean_of_what_counts(case: tuple[Tensor, Tensor, list[float]]) -> None:
    """Checklist 12. Without any counted element the mean is 0."""
    x, mask, counted = case
    expected = statistics.fmean(counted) if counted else 0.0
    assert masked_mean(x, mask).item() == pytest.approx(expected, abs=1e-9)


@quick
@given(counted_elements())
def test_masked_variance_is_unbiased(case: tuple[Tensor, Tensor, list[float]]) -> None:
    """Checklist 39 and Checklist 41. Divided by n - 1; 0 when fewer than two elements count."""
    x, mask, counted = case
    expected = statistics.variance(counted) if len(counted) > 1 else 0.0
    assert masked_variance(x, mask).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_masked_variance_survives_a_large_offset() -> None:
    """The sum of squares minus the squared sum would lose every digit here."""
    x = 1e4 + torch.tensor([[-1.0, 0.0, 1.0, 5.0]])
    assert masked_variance(x, torch.tensor([[True, True, True, False]])).item() == pytest.approx(1.0)


@quick
@given(counted_elements(), st.booleans())
def test_whiten_by_definition(case: tuple[Tensor, Tensor, list[float]], shift_mean: bool) -> None:
    """Checklist 38 and Checklist 39. Over a Python list of the counted elements; 1e-8 goes inside the root."""
    x, mask, counted = case
    mean = statistics.fmean(counted) if counted else 0.0
    variance = statistics.variance(counted) if len(counted) > 1 else 0.0
    expected = torch.zeros_like(x)
    expected[mask] = torch.tensor(
        [(v - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean) for v in counted], dtype=x.dtype
    )
    assert_close(whiten(x, mask, shift_mean=shift_mean), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("shift_mean", "mean"), [(True, 0.0), (False, 5.0)])
def test_whitened_moments(shift_mean: bool, mean: float) -> None:
    """Checklist 38 and Checklist 23. Mean 0 (or the old one) and standard deviation 1 over what counts."""
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    mask = torch.arange(8) < torch.tensor([8, 1, 0, 5, 3, 7]).unsqueeze(1)
    x = x - x[mask].mean() + 5
    whitened = whiten(x, mask, shift_mean=shift_mean)[mask]
    assert_close(whitened.mean(), torch.tensor(mean, dtype=torch.float64))
    assert_close(whitened.std(unbiased=True), torch.tensor(1.0, dtype=torch.float64))


def test_the_scale_of_whitening_is_the_factor_that_it_multiplies_by() -> None:
    """0 where the elements are the same up to rounding, as what is whitened is 0 there."""
    x, mask = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5) > 0.3
    centered = x - x[mask].mean()
    assert_close(whiten(x, mask)[mask], centered[mask] * whitening_scale(x, mask))
    same = torch.full((2, 3), 0.7, dtype=torch.float64)
    assert float(whitening_scale(same, torch.ones_like(same).bool())) == 0


def test_whiten_constant_sits_inside_the_root() -> None:
    """Checklist 39. At a variance of 1e-8 the root grows by sqrt(2): +-1e-4 / sqrt(2) becomes +-1/2."""
    x = torch.tensor([[-1e-4, 1e-4]], dtype=torch.float64) / math.sqrt(2)
    expected = torch.tensor([[-0.5, 0.5]], dtype=torch.float64)
    assert_close(whiten(x, torch.ones(1, 2, dtype=torch.bool)), expected)


def test_whiten_takes_its_moments_over_the_batch_not_the_row() -> None:
    """Rows that differ from each other still differ afterward."""
    x = torch.tensor([[1.0, 2.0], [11.0, 12.0]], dtype=torch.float64)
    whitened = whiten(x, torch.ones_like(x, dtype=torch.bool))
    assert whitened[0].max() < 0 < whitened[1].min()
    assert_close(whitened, torch.tensor(((x - 6.5) / x.std()).tolist(), dtype=torch.float64))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_of_one_element(shift_mean: bool) -> None:
    """Checklist 41. Its own mean: 0 when shifted away, itself when kept."""
    x, mask = torch.tensor([[3.0, 99.0]]), torch.tensor([[True, False]])
    assert_close(whiten(x, mask, shift_mean=shift_mean), torch.tensor([[0.0 if shift_mean else 3.0, 0.0]]))


def test_position_ids_ignore_left_padding() -> None:
    """Checklist 2. A row has the positions that it has without its padding."""
    lengths = [5, 3, 1]
    mask = torch.tensor([[False] * (5 - n) + [True] * n for n in lengths])
    positions = position_ids(mask)
    assert positions.dtype == torch.int64
    for row, n in zip(positions, lengths, strict=True):
        assert row[5 - n :].tolist() == list(range(n))
        assert row[: 5 - n].eq(0).all()  # a valid index of the position table


def test_position_ids_count_the_counted() -> None:
    """Checklist 2. Each counted token's position is the number of counted tokens before it, for all masks."""
    mask = every_mask(5)
    for row, positions in zip(mask.tolist(), position_ids(mask).tolist(), strict=True):
        assert all(positions[i] == sum(row[:i]) for i in range(5) if row[i])
        assert min(positions) >= 0


def response_length(ids: list[int], stops: set[int]) -> tuple[int, bool]:
    """Number of tokens up to and including the first stop, found by walking."""
    for i, token in enumerate(ids):
        if token in stops:
            return i + 1, True
    return len(ids), False


@quick
@given(
    st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1)),
    st.sets(st.integers(0, 4)),
)
def test_until_first_stop_against_walking(rows: list[list[int]], stops: set[int]) -> None:
    """Checklist 7, Checklist 8 and Checklist 10. Any rows, any number of stop ids, none included."""
    mask, finished = until_first_stop(torch.tensor(rows), torch.tensor(sorted(stops), dtype=torch.int64))
    walked = [response_length(row, stops) for row in rows]
    assert mask.dtype == finished.dtype == torch.bool
    assert mask.tolist() == [[i < n for i in range(len(rows[0]))] for n, _ in walked]
    assert finished.tolist() == [ended for _, ended in walked]


@pytest.mark.parametrize(
    ("row", "counted", "ended"),
    [
        pytest.param([3, 4, STOP, PAD, PAD], 3, True, id="stop-counts-padding-does-not"),
        pytest.param([3, 4, 5, 3, 4], 5, False, id="no-stop"),
        pytest.param([3, STOP, 4, STOP, 5], 2, True, id="second-stop-ignored"),
        pytest.param([3, OTHER_STOP, 4, STOP, 5], 2, True, id="whichever-stop-comes-first"),
        pytest.param([STOP, 3, 3, 3, 3], 1, True, id="nothing-but-a-stop"),
        pytest.param([3, 4, 5, 3, STOP], 5, True, id="stop-at-the-end"),
        pytest.param([3, STOP, STOP, STOP, STOP], 2, True, id="padding-equals-stop"),
    ],
)
def test_until_first_stop(row: list[int], counted: int, ended: bool) -> None:
    """Checklist 7, Checklist 8, Checklist 9 and Checklist 10."""
    mask, finished = until_first_stop(torch.tensor([row]), torch.tensor([STOP, OTHER_STOP]))
    assert mask[0].tolist() == [True] * counted + [False] * (5 - counted)
    assert finished.tolist() == [ended]


def test_what_follows_the_stop_does_not_matter() -> None:
    """Checklist 11. Random content behind the stop, stops among it, leaves the mask as it is."""
    rows = torch.randint(0, 9, (50, 6), generator=torch.Generator().manual_seed(1))
    rows[:, 2] = STOP
    rows[:, :2] = 3
    mask, finished = until_first_stop(rows, torch.tensor([STOP, OTHER_STOP]))
    assert mask.tolist() == [[True] * 3 + [False] * 3] * 50
    assert finished.all()


def test_last_counted_of_all_masks() -> None:
    """Checklist 12. 0 for the row in which none counts."""
    mask = every_mask(5)
    expected = [max([i for i in range(5) if row[i]], default=0) for row in mask.tolist()]
    assert last_counted(mask).tolist() == expected


def test_first_counted_of_all_masks() -> None:
    """Checklist 12. 0 for the row in which none counts."""
    mask = every_mask(5)
    expected = [min([i for i in range(5) if row[i]], default=0) for row in mask.tolist()]
    assert first_counted(mask).tolist() == expected
    assert first_counted(mask).dtype == torch.int64
