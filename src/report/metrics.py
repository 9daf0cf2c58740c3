"""What the logged numbers mean: the one home is `metrics.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

HOME = Path(__file__).with_name("metrics.yaml")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A logged number; `range` is where it is healthy, None at an open end and for no range at all."""

    name: str
    title: str
    unit: str | None
    meaning: str
    healthy: str | None
    bad: str | None
    range: tuple[float | None, float | None] | None = None

    def inside(self, value: float) -> bool:
        """Whether a value is in the healthy range; True without one."""
        low, high = self.range or (None, None)
        return (low is None or value >= low) and (high is None or value <= high)


@dataclass(frozen=True)
class Group:
    """Metrics that belong together."""

    name: str
    about: str | None
    metrics: tuple[Metric, ...]


@cache
def groups() -> tuple[Group, ...]:
    """All groups in the order of the page."""
    read = yaml.safe_load(HOME.read_text(encoding="utf-8"))
    return tuple(Group(g["group"], g["about"], tuple(Metric(**_row(m)) for m in g["metrics"])) for g in read)


def metric_of(name: str) -> Metric:
    """The metric of that name; one that only its own name is known of for a name that is not documented."""
    for known in (metric for group in groups() for metric in group.metrics):
        stem = known.name.removesuffix("NAME")
        if name == known.name or (stem != known.name and name.startswith(stem)):
            title = known.title if name == known.name else f"{known.title}: {name.removeprefix(stem)}"
            return Metric(**vars(known) | {"name": name, "title": title})
    return Metric(name=name, title=name, unit=None, meaning="logged by a callback of the run", healthy=None, bad=None)


def _row(content: dict) -> dict:
    ends = content.get("range")
    return content | ({"range": tuple(ends)} if ends is not None else {})
