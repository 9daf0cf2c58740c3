"""The page of a run: `report.html` in its folder, one file that asks no network for anything."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from src.report import charts
from src.report.bands import band_of_run, band_title
from src.report.charts import Chart, Curve, column, thinned
from src.report.findings import findings, reached
from src.report.metrics import Metric, groups, metric_of
from src.report.phases import phase_chart, phases
from src.report.read import RunData, Table, figures, read_run, stage_folders
from src.report.settings import command, differences
from src.report.tokens import token_view
from src.report.visible import visible
from src.utils.statistics import Figure

PAGE = "report.html"
TEMPLATES = Path(__file__).with_name("templates")
MOST_BYTES_OF_TEXTS = 200_000  # of the answers before and after
ENDS = ("_low", "_high")  # of the names of an interval's two ends
STEPS = {"ppo": "iteration", "reward": "step", "sft": "step"}
STAGE_TITLES = {"ppo": "PPO", "reward": "Reward model", "sft": "SFT"}


def write_page(given: str | Path, target: Path | None = None) -> Path:
    """Write the page of a run or a pipeline into its folder, or to `target`; returns its path.

    Raises `ConfigError` where there is no run.
    """
    folders = stage_folders(given)
    runs = [read_run(folder) for folder in folders]
    page = target or Path(given).expanduser() / PAGE
    return write(page, "run.jinja", of_run(runs[0], runs[1:]))


def of_run(run: RunData, before: Sequence[RunData]) -> dict[str, Any]:
    """What the template of a run shows; `before` are the runs that made its models."""
    reward = next((r for r in (run, *before) if r.reward), None)
    answers, of_all = _answers(run)
    return {
        "title": run.name,
        "run": run,
        "stage": STAGE_TITLES.get(run.stage, run.stage),
        "command": command(run),
        "seconds": [
            (STAGE_TITLES.get(r.stage, r.stage), r.result["seconds"]) for r in (run, *before) if "seconds" in r.result
        ],
        "compared": {"sft", "ppo"} <= set(figures(run.result)),
        "reached": reached(run),
        "findings": findings(run),
        "answers": answers,
        "of_all_answers": of_all,
        "goals": _goals(run),
        "sections": [section for r in (run, *before) for section in _sections(r, named=r is not run)],
        "reward": reward,
        "reward_figures": figures(reward.result).get("reward_model", {}) if reward is not None else {},
        "reward_charts": _reward_charts(reward.reward) if reward is not None else [],
        "phases": phases(run.timing),
        "phase_charts": [phase_chart(run.timing)] if phases(run.timing) else [],
        "band": None if (band := band_of_run(run)) is None else band_title(run, band),
        "differences": differences(run) if run.config else None,
        "config": _yaml(run),
        "missing": [(r.name, sentence) for r in (run, *before) for sentence in r.missing],
        "tokens": token_view(run.samples),
    }


def write(path: Path, template: str, content: dict[str, Any]) -> Path:
    """Render a template and write it whole or not at all."""
    found = [chart for value in content.values() for chart in _charts_in(value)]
    data = {"charts": {chart.id: chart.item for chart in found}, "tokens": content.get("tokens")}
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    text = (
        _environment()
        .get_template(template)
        .render(
            content,
            data=Markup(json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")),
            script=Markup(script),
            library=base64.b64encode(gzip.compress(_bokeh().encode(), mtime=0)).decode(),
            policy=" ".join(f"'sha256-{_digest(text)}'" for text in (script, _bokeh())),
            style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
            written=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
    )
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:  # half of it would fill a full disk
        temporary.unlink(missing_ok=True)
        raise
    return path


def _sections(run: RunData, named: bool) -> list[dict[str, Any]]:
    """A chart for each logged number, by group."""
    step, prefix = STEPS.get(run.stage, "step"), f"{STAGE_TITLES.get(run.stage, run.stage)}: " if named else ""
    table = {n: run.metrics.get(n, {}) | run.timing.get(n, {}) for n in sorted({*run.metrics, *run.timing})}
    logged = {name for row in table.values() for name in row}
    names = logged - {f"{name}{end}" for name in logged for end in ENDS}
    order = [metric.name for group in groups() for metric in group.metrics]
    known = {name: metric_of(name) for name in sorted(names)}
    bands, found = _bands(run), []
    for group in groups():
        of_group = {metric.name.removesuffix("NAME") for metric in group.metrics}
        own = [n for n in known if n in of_group or any(s.endswith(("_", "/")) and n.startswith(s) for s in of_group)]
        own.sort(key=lambda n: order.index(n) if n in order else len(order))
        found.append((prefix + group.name, own))
    grouped = {name for _, own in found for name in own}
    found.append((f"{prefix}Other", [name for name in known if name not in grouped]))
    return [
        {
            "title": title,
            "open": not named and title not in ("Counters", "Seconds and memory", "Other"),
            "rows": [(known[n], _chart_of(known[n], table, step, run.stage, bands.get(n))) for n in own],
        }
        for title, own in found
        if own
    ]


def _bands(run: RunData) -> dict[str, Curve]:
    """The usual course of each curve that has one."""
    band = band_of_run(run)
    curves = {} if band is None else band.curves
    return {
        name: Curve("median of other seeds", list(zip(map(float, c.steps), c.median, strict=True)), c.low, c.high)
        for name, c in curves.items()
    }


def _chart_of(metric: Metric, table: Table, step: str, stage: str, band: Curve | None) -> Chart:
    points, ends = column(table, metric.name), [column(table, f"{metric.name}{end}") for end in ENDS]
    has_interval = all([x for x, _ in end] == [x for x, _ in points] for end in ends)
    low, high = ([y for _, y in end] for end in ends)
    curve = Curve("", points, low, high) if has_interval else thinned(points)
    return charts.metric_chart(metric, [curve], step, key=stage, band=band)


def _goals(run: RunData) -> list[Chart]:
    """Reward against KL, and gold against the score that was trained on; each point is an iteration."""
    table, found = run.metrics, []

    def pairs(x: str, y: str) -> list[charts.Point]:
        rows = [(row[x], row[y]) for _, row in sorted(table.items()) if x in row and y in row]
        known = [row for row in rows if all(map(math.isfinite, row))]
        return known[:: -(-len(known) // charts.MOST_POINTS) or 1]

    for title, x, names in (
        ("score against KL", "rollout/kl", ("rollout/score", "rollout/gold")),
        ("gold against the score", "rollout/score", ("rollout/gold",)),
    ):
        curves = [Curve(name.split("/")[1], pairs(x, name)) for name in names if pairs(x, name)]
        if curves:
            x_label = f"{metric_of(x).title} ({metric_of(x).unit})"
            found.append(charts.against(title, x_label, " and ".join(curve.label for curve in curves), curves))
    return found


def _reward_charts(reward: dict[str, Any]) -> list[Chart]:
    x_label = "margin r(chosen) - r(rejected)"
    histogram = charts.bars("margins on held-out pairs", x_label, "pairs", reward["edges"], reward["pairs"], mark=0)
    return [histogram, charts.reliability(reward["bins"])]


def _answers(run: RunData) -> tuple[list[dict[str, Any]], int]:
    """The answers before and after that fit into the page, and how many there are."""
    found: list[dict[str, Any]] = []
    size = 0
    for row in run.comparison:
        before, after = row.get("sft") or {}, row.get("ppo") or {}
        old, new = before.get("score"), after.get("score")
        gain = new - old if isinstance(old, int | float) and isinstance(new, int | float) else None
        size += len(str(row))
        if found and size > MOST_BYTES_OF_TEXTS:
            break
        found.append({"prompt": row.get("prompt", ""), "before": before, "after": after, "gain": gain})
    return found, len(run.comparison)


def _yaml(run: RunData) -> str:
    path = run.folder / "config.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _charts_in(value: Any) -> list[Chart]:
    if isinstance(value, Chart):
        return [value]
    if isinstance(value, dict):
        return [chart for part in value.values() for chart in _charts_in(part)]
    return [chart for part in value for chart in _charts_in(part)] if isinstance(value, list | tuple) else []


@cache
def _bokeh() -> str:
    (script,) = Resources(mode="inline", components=["bokeh"], log_level="error").js_raw[:1]
    return str(script)


@cache
def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _environment() -> Environment:
    """Every text is escaped."""
    made = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    made.filters |= {"visible": lambda text: visible(str(text)), "code": _code, "figure": _figure}
    return made


def _code(text: str) -> Markup:
    """A sentence in which `this` is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)))))


def _figure(figure: Figure, sign: str = "") -> Markup:
    """A number, with its interval in a second line."""
    if figure.interval is None:
        return Markup(f"{figure.value:{sign}.3f}")
    low, high = figure.interval
    return Markup(f"{figure.value:{sign}.3f}<br><small>{low:{sign}.3f} to {high:{sign}.3f}</small>")
