"""Intervals against the normal approximation, and how a figure is written."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from src.utils.statistics import Figure, as_result, bootstrap_mean, bootstrap_ratio, share


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


def test_rows_of_one_group_are_resampled_together() -> None:
    """Each of 100 rows four times, one group each: the interval is that of the 100, not of 400."""
    draws = random.Random(1)
    rows = [draws.gauss(0.0, 1.0) for _ in range(100)]
    fourfold, groups = [row for row in rows for _ in range(4)], [str(i) for i in range(100) for _ in range(4)]
    assert bootstrap_mean(fourfold, groups).interval == pytest.approx(bootstrap_mean(rows).interval, abs=1e-12)
    assert bootstrap_mean(fourfold, groups).n == 400


def test_the_interval_of_a_ratio_is_that_of_the_delta_method() -> None:
    """sum x / sum n over texts of unequal length: variance of (x - ratio n) over (mean n)^2, divided by the texts."""
    draws = random.Random(2)
    counts = [draws.randint(2, 30) for _ in range(400)]
    sums = [n * (2.0 + draws.gauss(0.0, 0.5)) for n in counts]
    found, ratio = bootstrap_ratio(sums, counts), sum(sums) / sum(counts)
    deviations = [x - ratio * n for x, n in zip(sums, counts, strict=True)]
    error = 1.96 * statistics.pstdev(deviations) / statistics.fmean(counts) / 400**0.5
    assert (found.value, found.n) == (pytest.approx(ratio), sum(counts))
    assert found.interval == pytest.approx((ratio - error, ratio + error), abs=0.1 * error)


@pytest.mark.parametrize(("right", "n"), [(0, 24), (1, 24), (16, 24), (23, 24), (24, 24), (512, 512), (3, 400)])
def test_a_share_has_the_exact_interval(right: int, n: int) -> None:
    """At each end the other tail of the binomial distribution, summed term by term, holds 2.5%."""
    found = share([1.0] * right + [0.0] * (n - right))
    assert (found.value, found.n) == (pytest.approx(right / n), n)
    assert found.interval is not None
    low, high = found.interval

    def tail(p: float, counts: range) -> float:
        return math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in counts)

    assert low == 0.0 if right == 0 else tail(low, range(right, n + 1)) == pytest.approx(0.025)
    assert high == 1.0 if right == n else tail(high, range(right + 1)) == pytest.approx(0.025)


def test_a_share_of_all_has_the_closed_form() -> None:
    """All right: alpha^(1/n), with alpha the 2.5% of a side."""
    assert share([1.0] * 512).interval == pytest.approx((0.025 ** (1 / 512), 1.0), abs=1e-12)
    assert f"{share([1.0] * 512):.3f}" == "1.000 (0.993 to 1.000)"


def test_a_share_with_repeated_prompts_is_no_surer_than_its_prompts() -> None:
    """Half of ten prompts are right, each asked 40 times: as uncertain as ten rows by the bootstrap."""
    rows, groups = [float(i % 2) for i in range(10) for _ in range(40)], [i for i in range(10) for _ in range(40)]
    by_prompt = bootstrap_mean([float(i % 2) for i in range(10)]).interval
    assert share(rows, groups).interval == pytest.approx(by_prompt, abs=1e-12)
    low, high = share(rows).interval or (0, 0)
    assert by_prompt is not None
    assert by_prompt[0] < low < 0.5 < high < by_prompt[1]
    assert share([1.0] * 400, groups).interval == share([1.0] * 400).interval


def test_shares_between_0_and_1_are_resampled() -> None:
    rows = [0.0, 0.5, 1.0, 1.0]
    assert share(rows) == bootstrap_mean(rows)


def test_a_figure_is_written_with_its_interval() -> None:
    assert f"{Figure(0.25, 4, (0.125, 0.5)):.2f}" == "0.25 (0.12 to 0.50)"
    assert f"{Figure(0.25, 4, None):.1f}" == "0.2"


def test_a_result_holds_n_and_interval_beside_each_name() -> None:
    figures = {"accuracy": Figure(0.5, 8, (0.25, 0.75)), "error": Figure(0.1, 3, None)}
    assert as_result(figures) == {
        "accuracy": 0.5, "error": 0.1, "n": {"accuracy": 8, "error": 3}, "interval": {"accuracy": [0.25, 0.75]},
    }  # fmt: skip
