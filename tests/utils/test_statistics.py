"""Intervals against the normal approximation, and how a figure is written."""

from __future__ import annotations

import random
import statistics

import pytest

from src.utils.statistics import Figure, as_result, bootstrap_mean


@pytest.mark.parametrize("scale", [1.0, 250.0])
def test_the_interval_of_many_rows_is_that_of_the_normal_distribution(scale: float) -> None:
    """Mean +- 1.96 standard errors, to a tenth of their width."""
    draws = random.Random(0)
    rows = [scale * draws.gauss(3.0, 1.0) for _ in range(400)]
    found = bootstrap_mean(rows)
    error = 1.96 * statistics.pstdev(rows) / 400**0.5
    assert (found.value, found.n) == (pytest.approx(statistics.fmean(rows)), 400)
    assert found.interval is not None
    assert found.interval[0] == pytest.approx(found.value - error, abs=0.1 * error)
    assert found.interval[1] == pytest.approx(found.value + error, abs=0.1 * error)


def test_the_same_rows_have_the_same_interval_and_one_row_has_none_around_it() -> None:
    rows = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert bootstrap_mean(rows) == bootstrap_mean(list(rows))
    assert bootstrap_mean([2.5] * 3).interval == (2.5, 2.5)
    low, high = bootstrap_mean(rows).interval or (0, 0)
    assert 0 <= low < 0.6 < high <= 1


def test_a_figure_is_written_with_its_interval() -> None:
    assert f"{Figure(0.25, 4, (0.125, 0.5)):.2f}" == "0.25 (0.12 to 0.50)"
    assert f"{Figure(0.25, 4, None):.1f}" == "0.2"


def test_a_result_holds_n_and_interval_beside_each_name() -> None:
    figures = {"accuracy": Figure(0.5, 8, (0.25, 0.75)), "error": Figure(0.1, 3, None)}
    assert as_result(figures) == {
        "accuracy": 0.5, "error": 0.1, "n": {"accuracy": 8, "error": 3}, "interval": {"accuracy": [0.25, 0.75]},
    }  # fmt: skip
