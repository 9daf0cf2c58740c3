"""The charts of a page, by bokeh: curves with their healthy range, two numbers against one another, bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal
from urllib.parse import quote

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool
from bokeh.models.annotations.geometry import BoxAnnotation, Span
from bokeh.plotting import figure

from src.report.metrics import Metric
from src.report.read import Table

MOST_POINTS = 200  # of a curve; a longer one is drawn as means of neighbors within their lowest and highest value
COLORS = ("#3d85c6", "#d9772b", "#2a9d6f", "#b05fb5", "#c0504d", "#7f7f3f", "#4bacc6", "#8064a2")  # on light and dark
HEALTHY = "#2a9d6f"
BAND = "#8a8f98"
Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A chart with what a reader needs who does not see it."""

    id: str
    title: str
    summary: str
    item: dict[str, Any]  # bokeh's JSON


@dataclass(frozen=True)
class Curve:
    """Points of a line, in order; `low` and `high` surround it where they are given."""

    label: str
    points: Sequence[Point]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def column(table: Table, name: str) -> list[Point]:
    """The finite values of a column by step."""
    rows = [(float(step), row[name]) for step, row in sorted(table.items()) if name in row]
    return [(step, value) for step, value in rows if math.isfinite(value)]


def thinned(points: Sequence[Point], label: str = "", most: int = MOST_POINTS) -> Curve:
    """At most `most` means of neighbors; their range is around them where there is more than one."""
    size = -(-len(points) // most)
    if size <= 1:
        return Curve(label, points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    values = [[y for _, y in part] for part in parts]
    means = [(part[-1][0], sum(ys) / len(ys)) for part, ys in zip(parts, values, strict=True)]
    return Curve(label, means, [min(ys) for ys in values], [max(ys) for ys in values])


def metric_chart(
    metric: Metric, curves: Sequence[Curve], step: str, key: str = "metric", band: Curve | None = None
) -> Chart:
    """A metric over the steps, its healthy range shaded, and the band of other runs behind it.

    `key` sets it apart on a page that has the metric twice.
    """
    blank = _blank_metric_chart(tuple(_look(curve) for curve in curves), band is not None, metric.range)
    values: dict[str, Any] = {_blank("step"): step}
    values[_blank("unit")] = metric.unit or metric.name.split("/")[-1].replace("_", " ")
    for place, curve in [*enumerate(curves), *([("band", band)] if band is not None else [])]:
        values[_blank("label", place)] = curve.label
        values |= {_blank(name, place): column for name, column in _columns(curve).items()}
    summary = [f"{curve.label} {_from_to(curve.points)}".strip() for curve in curves]
    summary += [f"{band.label} {_from_to(band.points)}"] if band is not None else []
    return Chart(quote(f"{key}-{metric.name}", safe=""), metric.title, "; ".join(summary), _filled(blank, values))


@dataclass(frozen=True)
class Look:
    """What decides how a curve is drawn, whatever its numbers."""

    labeled: bool
    surrounded: bool
    dotted: bool


@cache
def _blank_metric_chart(
    looks: tuple[Look, ...], with_band: bool, healthy: tuple[float | None, float | None] | None
) -> dict[str, Any]:
    """A chart with blanks for words and columns: bokeh takes a tenth of a second to build one, a page has dozens."""
    plot = _plot(_blank("step"), _blank("unit"))
    if with_band:
        source = ColumnDataSource({name: [_blank(name, "band")] for name in ("x", "y", "nr", "low", "high")})
        plot.varea("x", "low", "high", source=source, color=BAND, alpha=0.25)
        plot.line("x", "y", source=source, color=BAND, line_dash="dashed", line_width=1)
    for place, (color, look) in enumerate(zip(colors(len(looks)), looks, strict=True)):
        names = ("x", "y", "nr", *(("low", "high") if look.surrounded else ()))
        source = ColumnDataSource({name: [_blank(name, place)] for name in names})
        _draw_curve(plot, source, look, _blank("label", place), color, _blank("step"))
    low, high = healthy or (None, None)
    if healthy is not None and low != high:
        ends: dict[str, Any] = {"bottom": low, "top": high}
        plot.add_layout(BoxAnnotation(**ends, fill_color=HEALTHY, fill_alpha=0.08, level="underlay"))
        for end in (x for x in (low, high) if x is not None):
            plot.add_layout(Span(location=end, dimension="width", line_color=HEALTHY, line_dash="dotted"))
    return dict(json_item(plot))


def _look(curve: Curve) -> Look:
    return Look(bool(curve.label), curve.low is not None, len(curve.points) < 30)


def _blank(*names: object) -> str:
    return "\0" + " ".join(map(str, names))


def _filled(part: Any, values: dict[str, Any]) -> Any:
    """A copy of JSON in which each blank, or list of one blank, has its value."""
    if isinstance(part, dict):
        return {key: _filled(value, values) for key, value in part.items()}
    if isinstance(part, list | tuple):
        column = values.get(part[0]) if len(part) == 1 and isinstance(part[0], str) else None
        return column if isinstance(column, list) else [_filled(value, values) for value in part]
    return values.get(part, part) if isinstance(part, str) else part


def against(title: str, x_label: str, y_label: str, curves: Sequence[Curve], joined: bool = True) -> Chart:
    """Points of y over x; `joined` in their order and with a legend, or not; whiskers from `low` to `high`."""
    plot = _plot(x_label, y_label, mode="mouse")
    for color, curve in zip(colors(len(curves)), curves, strict=True):
        source = _source(curve)
        named: dict[str, Any] = {"legend_label": curve.label} if joined and len(curves) > 1 else {}
        if joined:
            plot.line("x", "y", source=source, color=color, alpha=0.35)
        if curve.low is not None:
            plot.segment("x", "low", "x", "high", source=source, color=color, line_width=2)
        dots = plot.scatter("x", "y", source=source, color=color, size=7, alpha=0.85, **named)
        plot.add_tools(
            HoverTool(renderers=[dots], tooltips=[("", curve.label), (x_label, "@x"), (y_label, "@y"), ("nr", "@nr")])
        )
    _legend(plot)
    return _chart(f"against-{title}", title, "; ".join(f"{c.label} {_from_to(c.points)}" for c in curves), plot)


def bars(
    title: str, x_label: str, y_label: str, edges: Sequence[float], heights: Sequence[float], mark: float
) -> Chart:
    """A histogram, with a line at `mark`."""
    plot = _plot(x_label, y_label, mode="mouse")
    source = ColumnDataSource({"left": list(edges[:-1]), "right": list(edges[1:]), "top": list(heights)})
    drawn = plot.quad("left", "right", "top", 0, source=source, color=COLORS[0], alpha=0.7)
    plot.add_layout(Span(location=mark, dimension="height", line_dash="dashed", line_color="#888888"))
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=[(x_label, "@left to @right"), (y_label, "@top")]))
    return _chart(f"bars-{title}", title, f"{sum(heights):g} {y_label} in {len(heights)} bars", plot)


def stacked(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> Chart:
    """Curves on top of one another, the first lowest; all have the same x."""
    plot = _plot(x_label, y_label)
    heights = {curve.label: [y for _, y in curve.points] for curve in curves}
    sums = [sum(column) for column in zip(*heights.values(), strict=True)]
    columns = {"x": [x for x, _ in curves[0].points], **heights, "sum": sums} if curves else {}
    source = ColumnDataSource({name: [float(f"{v:.6g}") for v in values] for name, values in columns.items()})
    shades = colors(len(heights))
    plot.varea_stack(list(heights), x="x", source=source, color=shades, alpha=0.75, legend_label=list(heights))
    top = plot.line("x", "sum", source=source, line_alpha=0)
    tips = [(x_label, "@x{0,0.[000]}"), *((name, f"@{{{name}}}") for name in [*heights, "sum"])]
    plot.add_tools(HoverTool(renderers=[top], mode="vline", tooltips=tips))
    plot.y_range.start = 0
    _legend(plot, columns=4)
    return _chart(f"stacked-{title}", title, "; ".join(f"{c.label} {_from_to(c.points)}" for c in curves), plot)


def reliability(bins: Iterable[dict[str, float]]) -> Chart:
    """Share of pairs ordered correctly over the probability that the reward model gave to its order."""
    points = [(row["p"], row["right"]) for row in bins]
    plot = _plot("p = sigmoid(|margin|)", "share ordered correctly", mode="mouse")
    plot.line([0.5, 1], [0.5, 1], color="#888888", line_dash="dashed", legend_label="perfectly calibrated")
    curve = Curve("", points)
    _draw_curve(plot, _source(curve), _look(curve), "", COLORS[0], "p")
    _legend(plot)
    return _chart("reliability", "calibration", _from_to(points), plot)


def _plot(x_label: str, y_label: str, mode: str = "vline") -> figure:
    plot = figure(
        height=230, sizing_mode="stretch_width", tools="pan,box_zoom,reset", active_drag=None, toolbar_location="above",
        x_axis_label=x_label, y_axis_label=y_label, background_fill_alpha=0, border_fill_alpha=0, outline_line_alpha=0,
    )  # fmt: skip
    plot.toolbar.autohide, plot.toolbar.logo = True, None
    plot.yaxis.axis_label_standoff = plot.xaxis.axis_label_standoff = 4
    plot.grid.grid_line_alpha = 0.25
    return plot


def _draw_curve(plot: figure, source: ColumnDataSource, look: Look, label: str, color: str, step: str) -> None:
    if look.surrounded:
        plot.varea("x", "low", "high", source=source, color=color, alpha=0.2)
    line = plot.line("x", "y", source=source, color=color, line_width=2)
    if look.dotted:
        plot.scatter("x", "y", source=source, color=color, size=4)
    tips = [*([("", label)] if look.labeled else []), (step, "@x{0,0.[000]}"), ("value", "@y")]
    plot.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=tips))


def _legend(plot: figure, columns: int | Literal["auto"] = "auto") -> None:
    """Above the curves, which it would hide; a click on a name hides or shows its curve."""
    if plot.legend and plot.legend[0] in plot.center:
        plot.add_layout(plot.legend[0], "above")
    for legend in plot.legend:
        legend.update(
            click_policy="hide", orientation="horizontal", background_fill_alpha=0, border_line_alpha=0, padding=0,
            margin=0, spacing=8, label_text_font_size="11px", label_text_color="#7f8794", ncols=columns,
        )  # fmt: skip


def _source(curve: Curve) -> ColumnDataSource:
    return ColumnDataSource(_columns(curve))


def _columns(curve: Curve) -> dict[str, list[float]]:
    columns = {"x": [x for x, _ in curve.points], "y": [y for _, y in curve.points]}
    columns |= {"nr": list(range(1, len(curve.points) + 1))}
    if curve.low is not None and curve.high is not None:
        columns |= {"low": list(curve.low), "high": list(curve.high)}
    return {name: [float(f"{x:.6g}") for x in values] for name, values in columns.items()}


def colors(count: int) -> list[str]:
    """A color for each of `count` curves."""
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _from_to(points: Sequence[Point]) -> str:
    if not points:
        return "nothing"
    (first_x, first), (last_x, last) = points[0], points[-1]
    return f"from {first:.4g} at {first_x:g} to {last:.4g} at {last_x:g}"


def _chart(name: str, title: str, summary: str, plot: figure) -> Chart:
    return Chart(quote(name, safe=""), title, summary, dict(json_item(plot)))
