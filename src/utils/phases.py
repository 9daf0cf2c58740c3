"""Seconds and peak memory of the phases of an iteration: work names its phase, `Resources` logs them.

There is one stopwatch, as there is one process whose memory is measured.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OTHER = "other"  # what no phase names
MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes in getrusage's unit


class Stopwatch:
    """Assigns all seconds from `start` on to phases; a phase within another does not count for the outer one.

    The peak memory of a phase is in bytes. On a GPU: the most that torch has allocated while the phase ran. Without
    one the system knows the peak of the process alone, which never falls: a phase in which it rose had that peak, and
    of a phase in which it did not, the peak is unknown.
    """

    def __init__(self) -> None:
        self.running = False
        self.most = 0  # bytes: the highest peak so far
        self._open: list[str] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, int] = {}
        self._since = 0.0

    def start(self) -> None:
        """Measure from now on."""
        self.running, self._since = True, _now()
        self.most = max(self.most, _peak())
        self._seconds, self._peaks = defaultdict(float), {}

    def stop(self) -> None:
        """Measure no longer."""
        self.running = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside belongs to the phase `name`; also a decorator of a function."""
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def collect(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds and known peaks, by phase, since this was last asked; the seconds add up to all that have passed."""
        self._lap()
        seconds, peaks = dict(self._seconds), self._peaks
        self._seconds, self._peaks = defaultdict(float), {}
        return seconds, peaks

    def _lap(self) -> None:
        if not self.running:
            return
        now, peak, name = _now(), _peak(), self._open[-1] if self._open else OTHER
        self._seconds[name] += now - self._since
        if torch.cuda.is_initialized():
            self._peaks[name] = max(self._peaks.get(name, 0), peak)
            torch.cuda.reset_peak_memory_stats()
        elif peak > self.most:
            self._peaks[name] = peak
        self.most, self._since = max(self.most, peak), now


def _now() -> float:
    """Seconds, when the GPU has done what it was asked for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak() -> int:
    """Bytes: the most that torch has allocated on the GPU since the last lap; without one the peak of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS


STOPWATCH = Stopwatch()
phase = STOPWATCH.phase


def peak_bytes() -> int:
    """The most that was held so far: by torch on a GPU, without one by the process."""
    return max(STOPWATCH.most, _peak())
