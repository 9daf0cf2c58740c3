"""Means with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


def bootstrap_mean(rows: list[float], resamples: int = 2000) -> Figure:
    """The mean of `rows` and its 95% percentile bootstrap interval (Efron and Tibshirani, 1993, chapter 13).

    The seed is fixed: the same rows give the same interval.
    """
    values = np.asarray(rows, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Figure(float(values.mean()), len(values), (float(low), float(high)))


def as_result(figures: dict[str, Figure]) -> dict[str, object]:
    """The figures as plain nested dictionaries: name -> value, n and interval."""
    return {
        **{name: figure.value for name, figure in figures.items()},
        "n": {name: figure.n for name, figure in figures.items()},
        "interval": {name: list(f.interval) for name, f in figures.items() if f.interval is not None},
    }
