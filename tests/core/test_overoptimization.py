"""Gao's form: recovered from its own points, and turning where its slope is 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from src.core.overoptimization import fit_gao_form, gao_form, turning_point


@pytest.mark.parametrize(("alpha", "beta"), [(1.2, 0.5), (0.4, -0.1), (-0.3, 0.2)])
def test_the_fit_recovers_what_made_the_points(alpha: float, beta: float) -> None:
    """R(d) = d (alpha - beta log d), written out, and 0 at d = 0."""
    points = [0.0, 0.3, 1.0, 2.5, 4.0]
    rise = [d * (alpha - beta * math.log(d)) if d else 0.0 for d in points]
    distance = torch.tensor(points, dtype=torch.float64)
    assert_close(gao_form(distance, alpha, beta), torch.tensor(rise, dtype=torch.float64))
    assert fit_gao_form(distance, torch.tensor(rise)) == pytest.approx((alpha, beta), rel=1e-5)


def test_the_fit_is_the_least_squares_one() -> None:
    """No small change of alpha or beta brings noisy points closer."""
    generator = torch.Generator().manual_seed(0)
    distance = torch.rand(50, dtype=torch.float64, generator=generator) * 3
    rise = gao_form(distance, 1.0, 0.4) + 0.1 * torch.randn(50, dtype=torch.float64, generator=generator)
    alpha, beta = fit_gao_form(distance, rise)

    def error(a: float, b: float) -> float:
        return (gao_form(distance, a, b) - rise).square().sum().item()

    for da, db in ((0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, -0.01)):
        assert error(alpha + da, beta + db) > error(alpha, beta)


def test_it_turns_where_the_slope_is_0() -> None:
    """dR/dd = alpha - beta - beta log d; none for a form that only rises."""
    turn = turning_point(1.2, 0.5)
    assert turn is not None
    assert 1.2 - 0.5 - 0.5 * math.log(turn) == pytest.approx(0)
    grid = torch.linspace(0.01, 10, 2000, dtype=torch.float64)
    assert grid[gao_form(grid, 1.2, 0.5).argmax()].item() == pytest.approx(turn, abs=0.01)
    assert turning_point(1.0, 0.0) is None
    assert turning_point(1.0, -0.5) is None


@pytest.mark.parametrize("distance", [[], [0.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
def test_too_few_points_are_refused(distance: list[float]) -> None:
    with pytest.raises(ValueError, match="two different distances"):
        fit_gao_form(torch.tensor(distance), torch.zeros(len(distance)))
