"""What is usual in an embedded experiment: the curves of runs with several seeds, and which curves of a run leave them.

`bands/EXPERIMENT.json` is made by `python -m benchmarks.bands EXPERIMENT` from finished runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from src.config.compose import compose
from src.report.read import RunData, Table
from src.report.settings import flat

HOME = Path(__file__).with_name("bands")
NAMES = (  # the curves that have a band
    *("rollout/score", "rollout/score_std", "rollout/gold", "rollout/kl", "rollout/response_length"),
    *("policy/old_kl", "policy/clip_fraction", "policy/entropy", "policy/grad_norm", "critic/explained_variance"),
)
ROWS = 5  # in a row outside, on one side: a single row is noise
NEIGHBORS = 2  # rows before and after one whose values its range holds too: few seeds alone make it ragged
# The range grows by this many times its width on either side. Of ten healthy seeds of experiment=sentiment, each
# against the others, one leaves at 0 and none from 0.1 on; the planted mistakes of benchmarks/sick.py leave at 1 too.
WIDER = 0.5
LEAST = 0.05  # of the largest median of the curve: a range is at least that wide


@dataclass(frozen=True)
class Curve:
    """Median, lowest and highest value of the seeds at each step; the range of a step holds its neighbors' values."""

    steps: Sequence[int]
    median: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    def ends(self) -> dict[int, tuple[float, float]]:
        """Step -> the range that is usual: lowest to highest value, widened by `WIDER` times its width."""
        least = LEAST * max(map(abs, self.median))
        found = {}
        for step, low, high in zip(self.steps, self.low, self.high, strict=True):
            more = WIDER * max(high - low, least)
            found[step] = (low - more, high + more)
        return found


@dataclass(frozen=True)
class Band:
    """The curves of an experiment by name, and the seeds that they come from."""

    experiment: str
    seeds: Sequence[int]
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class Left:
    """A curve that left its band: from `step` on for `rows` rows, where it was `value` and `low` to `high` is usual."""

    name: str
    step: int
    rows: int
    value: float
    low: float
    high: float

    def numbers(self) -> str:
        """The numbers in words."""
        return (
            f"from step {self.step} on for {self.rows} rows: {self.value:.3g}, usual {self.low:.3g} to {self.high:.3g}"
        )


def band_of_tables(experiment: str, tables: Mapping[int, Table]) -> Band:
    """The band of runs by seed, over the steps that all of them have logged."""
    steps = sorted(set.intersection(*(set(table) for table in tables.values())))
    known = [name for name in NAMES if all(name in table[step] for table in tables.values() for step in steps)]
    return Band(experiment, sorted(tables), {name: _curve(name, steps, list(tables.values())) for name in known})


def left(metrics: Table, band: Band) -> list[Left]:
    """The curves that were outside for `ROWS` rows in a row or more, each where it was so first."""
    found = []
    for name, curve in band.curves.items():
        sides = [_side(metrics.get(step, {}).get(name), ends) for step, ends in curve.ends().items()]
        start = next((i for i in range(len(sides) - ROWS + 1) if _one_side(sides[i : i + ROWS])), None)
        if start is None:
            continue
        rows = next((n for n, side in enumerate(sides[start:]) if side != sides[start]), len(sides) - start)
        step = curve.steps[start]
        found.append(Left(name, step, rows, metrics[step][name], *curve.ends()[step]))
    return sorted(found, key=lambda one: one.step)


@cache
def read_band(experiment: str) -> Band | None:
    """The recorded band of an experiment; None where there is none."""
    path = HOME / f"{experiment}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return Band(experiment, content["seeds"], {name: Curve(**curve) for name, curve in content["curves"].items()})


def write_band(band: Band, path: Path) -> None:
    """Write a band with four significant digits, a line per curve."""
    lines = []
    for name, curve in band.curves.items():
        numbers = {part: [float(f"{x:.4g}") for x in getattr(curve, part)] for part in ("median", "low", "high")}
        lines.append(f'"{name}": ' + json.dumps({"steps": list(curve.steps), **numbers}, separators=(",", ":")))
    path.parent.mkdir(exist_ok=True)
    text = ",\n".join(lines)
    path.write_text(f'{{"seeds": {json.dumps(list(band.seeds))}, "curves": {{\n{text}\n}}}}\n', encoding="utf-8")


def band_of_run(run: RunData) -> Band | None:
    """The band of the run's experiment; None where there is none, and for other stages than PPO."""
    chosen = run.config.get("choices")
    name = chosen.get("experiment") if isinstance(chosen, dict) else None
    return read_band(name) if run.stage == "ppo" and isinstance(name, str) else None


def other_settings(run: RunData) -> list[str]:
    """The keys in which a run differs from its experiment, without those that change no result."""
    default, here = _default(run.config["choices"]["experiment"]), _settings(run.config)
    return sorted(key for key in {*here, *default} if here.get(key) != default.get(key))


@cache
def _default(experiment: str) -> dict[str, str]:
    return _settings(compose([f"experiment={experiment}"]).plain())


def band_title(run: RunData, band: Band) -> str:
    """What the band is: of which seeds, and in what the run differs from it."""
    changed = other_settings(run)
    shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
    title = f"the band of {len(band.seeds)} seeds of experiment={band.experiment}"
    return title + (f", which has other settings ({shown})" if changed else "")


def _settings(config: dict[str, Any]) -> dict[str, str]:
    from src.checkpointing.resume import SAFE  # loads torch, which a page that finds no band does without

    free = ("seed", "trainer.accelerator", *SAFE)
    return {
        key: value
        for key, value in flat(config).items()
        if not any(key == name or key.startswith(f"{name}.") for name in free)
    }


def _curve(name: str, steps: list[int], tables: list[Table]) -> Curve:
    rows = [[table[step][name] for table in tables] for step in steps]
    near = [[x for row in rows[max(0, i - NEIGHBORS) : i + NEIGHBORS + 1] for x in row] for i in range(len(rows))]
    return Curve(steps, [median(row) for row in rows], [min(row) for row in near], [max(row) for row in near])


def _side(value: float | None, ends: tuple[float, float]) -> int:
    """-1 below the range, 1 above it or not finite, 0 in it or without a value."""
    if value is None:
        return 0
    if not math.isfinite(value):
        return 1
    return -1 if value < ends[0] else int(value > ends[1])


def _one_side(sides: Sequence[int]) -> bool:
    return sides[0] != 0 and len(set(sides)) == 1
