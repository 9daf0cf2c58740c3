"""The clock of `benchmarks.compare` for runs in the process that reads it."""

from __future__ import annotations

from typing import ClassVar

from benchmarks.compare.ours import PhaseClock
from benchmarks.compare.workload import Clock


class KeptClock(PhaseClock):
    """The hooks of `PhaseClock`, whose laps are kept in this process."""

    laps: ClassVar[list[dict[str, float]]] = []

    @staticmethod
    def make_clock(device: str) -> Clock:
        """A clock that keeps what it would print."""

        class Kept(Clock):
            def finish(self, response_tokens: int) -> None:
                KeptClock.laps.append(dict(self.cpu))
                self.__init__(self.device)  # type: ignore[misc]

        return Kept(device)
