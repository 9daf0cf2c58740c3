"""Where the seconds and the memory of a run went, by phase of its iterations."""

from __future__ import annotations

from dataclasses import dataclass

from src.report.charts import Chart, Curve, stacked, thinned
from src.report.metrics import metric_of
from src.report.read import Table

SECONDS, PEAK = "time/seconds_", "time/peak_gib_"
ORDER = ("rollout", "reward", "scoring", "policy", "critic", "measuring", "saving", "other")


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase, of an iteration and of all that were logged, and its highest known peak in GiB."""

    name: str
    mean: float
    share: float
    total: float
    peak: float | None


def phases(timing: Table) -> list[Phase]:
    """The phases of a run in the order of an iteration."""
    names = _names(timing)
    columns = {name: [row.get(SECONDS + name, 0.0) for row in timing.values()] for name in names}
    whole = sum(map(sum, columns.values())) or 1.0
    peaks = {name: [row[PEAK + name] for row in timing.values() if PEAK + name in row] for name in names}
    return [
        Phase(name, sum(spent) / len(spent), sum(spent) / whole, sum(spent), max(peaks[name], default=None))
        for name, spent in columns.items()
    ]


def phase_chart(timing: Table) -> Chart:
    """The seconds of each iteration, stacked."""
    steps = sorted(timing)
    points = {name: [(float(step), timing[step].get(SECONDS + name, 0.0)) for step in steps] for name in _names(timing)}
    curves = [Curve(name, thinned(column).points) for name, column in points.items()]
    return stacked("seconds of an iteration", "iteration", metric_of(f"{SECONDS}NAME").unit or "", curves)


def _names(timing: Table) -> list[str]:
    known = {name.removeprefix(SECONDS) for row in timing.values() for name in row if name.startswith(SECONDS)}
    plain = filter(str.isidentifier, known)  # a table may have been written by anyone
    return sorted(plain, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
