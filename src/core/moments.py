"""Mean and variance of a stream of numbers, batch by batch, exactly as if all of them had come at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from src.core.shapes import PerSequence


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared deviations of what was seen so far."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation, sqrt(squares / (count - 1)); 1 while fewer than two numbers were seen."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 1.0


def of_batch(x: PerSequence) -> Moments:
    """The moments of one batch. Shapes: (B,)."""
    x = x.double()
    mean = x.mean().item() if len(x) else 0.0
    return Moments(float(len(x)), mean, (x - mean).square().sum().item())


def combined(a: Moments, b: Moments) -> Moments:
    """The moments of both together: mean = (n_a m_a + n_b m_b) / n, S = S_a + S_b + (m_b - m_a)^2 n_a n_b / n.

    Source: Chan, Golub & LeVeque 1979, Welford's method for batches (https://doi.org/10.2307/2683386).
    """
    count = a.count + b.count
    if count == 0:
        return a
    difference = b.mean - a.mean
    mean = a.mean + difference * b.count / count
    return Moments(count, mean, a.squares + b.squares + difference**2 * a.count * b.count / count)
