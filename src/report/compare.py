"""Several runs on one page: what differs, what came of it, reward against KL, curves over one another."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.config.files import key_of
from src.report import charts
from src.report.charts import Chart, Curve, column, thinned
from src.report.findings import TITLES, Finding, findings
from src.report.metrics import groups, metric_of
from src.report.page import STEPS, write
from src.report.read import RunData, figures, read_run, stage_folders
from src.report.settings import ABSENT, flat
from src.utils.statistics import Figure, bootstrap_mean

PAGE = "comparison.html"
OF_STAGE = {"ppo": "ppo", "reward": "reward_model", "sft": "sft"}  # the group of a result that is compared
T_975 = (  # 97.5% quantile of Student's t with 1, 2, ... degrees of freedom; the normal one beyond
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Compared:
    """A run with its name in the comparison and its figures."""

    name: str
    run: RunData
    figures: Mapping[str, Figure]
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Difference:
    """A figure of a run minus that of the first run, over the prompts that both answered, with a 95% interval."""

    run: str
    name: str
    difference: Figure


def write_comparison(
    given: Sequence[str | Path], target: Path | None = None, failed: Mapping[str, str] | None = None
) -> Path:
    """Write the page to `target`, or into the folder that the runs have in common; `failed`: name -> why.

    Raises `ConfigError` where one of them is no run.
    """
    runs = [read_run(stage_folders(folder)[0]) for folder in given]
    page = target or Path(os.path.commonpath([run.folder.resolve().parent for run in runs])) / PAGE
    return write(page, "compare.jinja", comparison(runs, failed or {}))


def comparison(runs: Sequence[RunData], failed: Mapping[str, str]) -> dict[str, Any]:
    """What the template shows."""
    compared = [Compared(name, run, _figures(run), findings(run)) for name, run in zip(_names(runs), runs, strict=True)]
    shown = [name for name in TITLES if any(name in one.figures for one in compared)]
    shown += sorted({name for one in compared for name in one.figures} - set(shown))
    return {
        "title": f"{len(runs)} runs",
        "runs": compared,
        "colors": charts.colors(len(compared)),
        "failed": failed,
        "settings": differing([run.config for run in runs]),
        "names": shown,
        "titles": {name: TITLES.get(name, name.replace("_", " ")) for name in shown},
        "seeds": over_seeds(compared),
        "paired": [difference for one in compared[1:] for difference in paired(compared[0], one)],
        "frontier": _frontier(compared),
        "curves": _curves(compared),
        "missing": [(one.name, sentence) for one in compared for sentence in one.run.missing],
    }


def differing(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Key -> its value in each configuration, for the keys that do not have one value in all of them.

    Of keys with the same values everywhere, as where one sets others, it is the one that a command gave, or the first.
    """
    plain = [flat(config) for config in configs]
    given = {key_of(str(override)) for config in configs for override in config.get("overrides") or []}
    keys = sorted(dict.fromkeys(key for config in plain for key in config), key=lambda key: key not in given)
    rows = {key: [config.get(key, ABSENT) for config in plain] for key in keys}
    named: dict[tuple[str, ...], str] = {}
    for key, values in rows.items():
        if len(set(values)) > 1:
            named.setdefault(tuple(values), key)
    return {key: list(values) for values, key in named.items()}


def over_seeds(compared: Sequence[Compared]) -> list[tuple[list[str], dict[str, Figure]]]:
    """Runs that differ in their seed alone: their names, and the mean of each figure with Student's 95% interval.

    A path counts where a command gave it: stages hand the others to one another. Of runs of one seed the first counts.
    """
    by_settings: dict[str, dict[Any, Compared]] = {}
    for one in compared:
        given = {key_of(str(override)) for override in one.run.config.get("overrides") or []}
        settings = {
            key: value
            for key, value in flat(one.run.config).items()
            if key != "seed" and (".path" not in key or key in given)
        }
        if one.figures:
            by_settings.setdefault(str(sorted(settings.items())), {}).setdefault(one.run.config.get("seed"), one)
    found = []
    for same in (list(runs.values()) for runs in by_settings.values() if len(runs) > 1):
        shared = [name for name in same[0].figures if all(name in one.figures for one in same)]
        means = {name: mean_with_interval([one.figures[name].value for one in same]) for name in shared}
        found.append(([one.name for one in same], means))
    return found


def mean_with_interval(values: Sequence[float]) -> Figure:
    """The mean of independent values, and mean +- t s / sqrt(n): its 95% interval if they are normal."""
    n, mean = len(values), sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = (T_975[n - 2] if n - 2 < len(T_975) else 1.96) * deviation / math.sqrt(n)
    return Figure(mean, n, (mean - half, mean + half))


def paired(first: Compared, other: Compared) -> list[Difference]:
    """Score and gold of `other` minus `first`, prompt by prompt; empty unless both answered the same prompts."""
    rows = list(zip(first.run.comparison, other.run.comparison, strict=False))
    same = [row["prompt"] for row in first.run.comparison] == [row["prompt"] for row in other.run.comparison]
    found = []
    for name in ("score", "gold") if same else ():
        triples = [(a["prompt"], a["ppo"].get(name), b["ppo"].get(name)) for a, b in rows]
        gains = [(p, b - a) for p, a, b in triples if isinstance(a, float | int) and isinstance(b, float | int)]
        if gains:
            prompts, differences = zip(*gains, strict=True)
            found.append(Difference(other.name, name, bootstrap_mean(differences, prompts)))
    return found


def _figures(run: RunData) -> dict[str, Figure]:
    found = figures(run.result).get(OF_STAGE.get(run.stage, "ppo"), {})
    return {name: Figure(value, 0, (ends[0], ends[1]) if ends else None) for name, (value, ends) in found.items()}


def _names(runs: Sequence[RunData]) -> list[str]:
    """The shortest ends of the folders' paths that tell the runs apart."""
    parts = [run.folder.resolve().parts for run in runs]
    length = next(n for n in range(1, 100) if len({path[-n:] for path in parts}) == len(set(parts)))
    return ["/".join(path[-length:]) for path in parts]


def _frontier(compared: Sequence[Compared]) -> list[Chart]:
    """Score, and gold, over KL, each run a point with its 95% interval."""
    found = []
    for name in ("score", "gold"):
        points = [one for one in compared if {name, "kl"} <= set(one.figures)]
        curves = [
            Curve(one.name, [(one.figures["kl"].value, one.figures[name].value)], *_whiskers(one.figures[name]))
            for one in points
        ]
        if len(curves) > 1:
            title = f"{TITLES[name]} over KL, held-out prompts"
            found.append(charts.against(title, TITLES["kl"], TITLES[name], curves, joined=False))
    return found


def _whiskers(figure: Figure) -> tuple[list[float] | None, list[float] | None]:
    return (None, None) if figure.interval is None else ([figure.interval[0]], [figure.interval[1]])


def _curves(compared: Sequence[Compared]) -> list[tuple[Any, Chart]]:
    """The curves of each logged number, those of all runs over one another."""
    tables = [{s: one.run.metrics.get(s, {}) | one.run.timing.get(s, {}) for s in one.run.metrics} for one in compared]
    logged = {name for table in tables for row in table.values() for name in row}
    known = [metric.name for group in groups() for metric in group.metrics if group.name != "Counters"]
    order = [name for name in known if name in logged]
    order += sorted(name for name in logged - set(known) if not name.startswith("train/"))
    step, most = STEPS.get(compared[0].run.stage, "step"), max(20, 2 * charts.MOST_POINTS // len(compared))
    found = []
    for name in order:
        drawn = [thinned(column(table, name), one.name, most) for one, table in zip(compared, tables, strict=True)]
        drawn = [curve for curve in drawn if curve.points]
        if drawn:
            found.append((metric_of(name), charts.metric_chart(metric_of(name), drawn, step)))
    return found
