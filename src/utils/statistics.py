"""Means with confidence intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

TAIL = 0.025  # on each side of a 95% interval


@dataclass(frozen=True)
class Figure:
    """A mean over n rows with a 95% interval (None if resampling rows has no meaning)."""

    value: float
    n: int
    interval: tuple[float, float] | None

    def __format__(self, spec: str) -> str:
        """`value (low to high)`, each number by `spec`; only the value without an interval."""
        if self.interval is None:
            return format(self.value, spec)
        low, high = (format(end, spec) for end in self.interval)
        return f"{self.value:{spec}} ({low} to {high})"


def bootstrap_mean(rows: Sequence[float], groups: Sequence[Hashable] | None = None) -> Figure:
    """The mean of `rows` and its 95% percentile bootstrap interval (Efron and Tibshirani, 1993, chapter 13).

    Rows of one group depend on each other, as answers to one prompt do: whole groups are resampled. Without `groups`
    each row is its own.
    """
    values = np.asarray(rows, dtype=np.float64)
    group = np.arange(len(values)) if groups is None else _numbers(groups)
    ratio = bootstrap_ratio(np.bincount(group, values), np.bincount(group))
    return Figure(float(values.mean()), len(values), ratio.interval)


def bootstrap_ratio(sums: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> Figure:
    """sum(sums) / sum(counts), n = sum(counts), and its 95% percentile bootstrap interval over the (sum, count) pairs.

    The seed is fixed: the same rows give the same interval.
    """
    above, below = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(above), size=(2000, len(above)))
    low, high = np.percentile(above[draws].sum(axis=1) / below[draws].sum(axis=1), [100 * TAIL, 100 * (1 - TAIL)])
    return Figure(float(above.sum() / below.sum()), int(below.sum()), (float(low), float(high)))


def share(rows: Sequence[float], groups: Sequence[Hashable] | None = None) -> Figure:
    """The mean of rows from 0 to 1; if each is 0 or 1, its interval is the exact one of a binomial share.

    Clopper and Pearson (1934), "The use of confidence or fiducial limits". Rows that share a group widen it to the
    bootstrap interval over the groups. With other rows in between, the interval is that of `bootstrap_mean`.
    """
    found = bootstrap_mean(rows, groups)
    if not set(rows) <= {0.0, 1.0} or found.interval is None:
        return found
    right, n = round(sum(rows)), len(rows)
    low, high = _lower_bound(right, n), 1 - _lower_bound(n - right, n)
    if groups is not None and len(set(groups)) < n:
        low, high = min(low, found.interval[0]), max(high, found.interval[1])
    return Figure(found.value, n, (low, high))


def _lower_bound(successes: int, n: int) -> float:
    """The share p with P(at least `successes` of n) = 2.5%, by bisection; 0 without successes."""
    if successes == 0:
        return 0.0
    more = np.arange(successes, n + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_ways = log_factorials[n] - log_factorials[more] - log_factorials[n - more]
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        tail = np.exp(log_ways + more * np.log(p) + (n - more) * np.log1p(-p)).sum()
        low, high = (p, high) if tail < TAIL else (low, p)
    return high


def _numbers(groups: Sequence[Hashable]) -> np.ndarray:
    """The number of each row's group, counted from 0 by first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups])


def as_result(figures: dict[str, Figure]) -> dict[str, object]:
    """The figures as plain nested dictionaries: name -> value, n and interval."""
    return {
        **{name: figure.value for name, figure in figures.items()},
        "n": {name: figure.n for name, figure in figures.items()},
        "interval": {name: list(f.interval) for name, f in figures.items() if f.interval is not None},
    }
