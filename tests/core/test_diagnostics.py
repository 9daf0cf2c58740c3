"""Explained variance."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.core.diagnostics import calibration, calibration_error, correlation, explained_variance


@pytest.fixture
def mask() -> Tensor:
    return torch.tensor([[True, True, True, False], [True, False, True, False], [False, False, False, False]])


@pytest.fixture
def returns(mask: Tensor) -> Tensor:
    return torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_by_definition(returns: Tensor, mask: Tensor) -> None:
    """Checklist 54. 1 - Var(R - V) / Var(R), by the statistics module on the counted tokens."""
    values = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    residual = statistics.variance((returns - values)[mask].tolist())
    expected = 1 - residual / statistics.variance(returns[mask].tolist())
    assert explained_variance(values, returns, mask).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("slope", "expected"),
    [
        pytest.param(1.0, 1.0, id="perfect"),
        pytest.param(0.0, 0.0, id="constant"),
        pytest.param(-1.0, -3.0, id="worse-than-a-constant"),
        pytest.param(0.5, 0.75, id="half-way"),
    ],
)
def test_linear_critics(returns: Tensor, mask: Tensor, slope: float, expected: float) -> None:
    """Checklist 54. V = slope R + 9 leaves (1 - slope)^2 of the variance; an offset is no matter of variance."""
    actual = explained_variance(slope * returns + 9, returns, mask)
    assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("counted", [0, 1, 2, 3])
def test_zero_where_the_returns_do_not_vary(counted: int) -> None:
    """Checklist 54, Checklist 12 and Checklist 41. No token, one token, or equal returns."""
    mask = torch.arange(4).unsqueeze(0) < counted
    returns = torch.full((1, 4), 0.5).masked_fill(~mask, 8.0)
    assert_close(explained_variance(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), returns, mask), torch.tensor(0.0))


@pytest.mark.parametrize("constant", [0.1, 0.7, -3.3])
def test_zero_where_equal_returns_are_no_binary_fractions(constant: float) -> None:
    """Checklist 54. 0.1 summed ten times is not 1: equal returns must still count as equal."""
    values = torch.arange(10.0).unsqueeze(0)
    returns = torch.full((1, 10), constant)
    assert_close(explained_variance(values, returns, torch.ones(1, 10, dtype=torch.bool)), torch.tensor(0.0))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("spread", "varies"), [(0.9e-5, False), (1.1e-5, True), (0.1, True)])
def test_rounding_is_told_from_variation_at_any_size(size: float, spread: float, varies: bool) -> None:
    """A standard deviation of 1e-5 root mean squares is the edge: values of size (1 +- spread), predicted exactly."""
    signs = torch.tensor([1.0, -1.0] * 5000, dtype=torch.float64).reshape(100, 100)
    returns = size * (1 + spread * signs)
    explained = explained_variance(returns, returns, torch.ones(100, 100, dtype=torch.bool))
    assert explained.item() == (1.0 if varies else 0.0)


def test_correlation_is_that_of_the_standard_library() -> None:
    x, y = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert correlation(x, y).item() == pytest.approx(statistics.correlation(x.tolist(), y.tolist()))
    assert correlation(x, -2 * x + 1).item() == pytest.approx(-1)
    assert correlation(x, torch.ones(40, dtype=torch.float64)).item() == 0


def test_calibration_by_hand() -> None:
    """Five bins from 0.5 to 1, margins whose p = sigmoid(|m|) lies in the first, third and last of them."""
    p = [0.55, 0.58, 0.75, 0.97, 0.99, 0.98, 0.96]
    signs = [1, -1, -1, 1, 1, 1, -1]
    margins = torch.tensor([s * math.log(q / (1 - q)) for q, s in zip(p, signs, strict=True)], dtype=torch.float64)
    sure, right, count = calibration(margins, 5)
    assert count.tolist() == [2, 0, 1, 0, 4]
    assert sure.tolist() == pytest.approx([0.565, 0, 0.75, 0, 0.975])
    assert right.tolist() == pytest.approx([0.5, 0, 0, 0, 0.75])
    expected = (2 * 0.065 + 1 * 0.75 + 4 * 0.225) / 7
    assert calibration_error(margins, 5).item() == pytest.approx(expected)


def test_an_honest_model_is_calibrated() -> None:
    """Orders drawn with the probability that the model gives them; a model that doubles its margins is too sure."""
    generator = torch.Generator().manual_seed(4)
    margins = 3 * torch.randn(20000, dtype=torch.float64, generator=generator).abs()
    wins = torch.rand(20000, dtype=torch.float64, generator=generator) < margins.sigmoid()
    honest = torch.where(wins, margins, -margins)
    assert calibration_error(honest).item() < 0.015
    assert calibration_error(2 * honest).item() > 0.04


def test_a_tie_is_half_right() -> None:
    _, right, count = calibration(torch.zeros(3, dtype=torch.float64), 4)
    assert right.tolist() == [0.5, 0, 0, 0]
    assert count.tolist() == [3, 0, 0, 0]


def test_small_numbers_are_correlated_too() -> None:
    """r does not depend on the units."""
    x, y = torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert correlation(1e-6 * x, 1e-3 * y).item() == pytest.approx(correlation(x, y).item())


def test_calibration_of_one_pair_and_by_ten_bins() -> None:
    """A pair ordered rightly with p = 0.7 is off by 0.3; without being told, bins are a twentieth wide."""
    one = torch.tensor([math.log(0.7 / 0.3)], dtype=torch.float64)
    assert calibration_error(one).item() == pytest.approx(0.3)
    margins = 2 * torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) + 1
    assert calibration_error(margins).item() == calibration_error(margins, 10).item()
    assert calibration_error(margins).item() != calibration_error(margins, 11).item()
