"""Charts, read back by bokeh from the JSON that the page holds."""

from __future__ import annotations

import json
from typing import Any

from bokeh.document import Document
from bokeh.models import BoxAnnotation, ColumnDataSource, HoverTool

from src.report.charts import Curve, metric_chart
from src.report.metrics import Metric


def metric(name: str, unit: str | None = None, ends: tuple[float | None, float | None] | None = None) -> Metric:
    return Metric(name=name, title=f"title of {name}", unit=unit, meaning="", healthy=None, bad=None, range=ends)


def drawn(item: dict[str, Any]) -> Any:
    (plot,) = Document.from_json(item["doc"]).roots
    assert plot.id == item["root_id"]
    return plot


def columns(plot: Any) -> list[dict[str, list[float]]]:
    """Of each source, in the order of drawing."""
    sources = {r.data_source.id: r.data_source for r in plot.renderers if isinstance(r.data_source, ColumnDataSource)}
    return [{name: list(values) for name, values in source.data.items()} for source in sources.values()]


def test_charts_that_look_alike_have_their_own_words_and_numbers() -> None:
    """They are copies of one chart."""
    one = metric_chart(metric("a/one", "nats", (0.0, 1.0)), [Curve("", [(1, 2.0), (2, 3.0)])], "step")
    two = metric_chart(metric("a/two_x", ends=(0.0, 1.0)), [Curve("", [(1, 5.0)])], "iteration")
    first, second = drawn(one.item), drawn(two.item)
    assert (first.xaxis[0].axis_label, first.yaxis[0].axis_label) == ("step", "nats")
    assert (second.xaxis[0].axis_label, second.yaxis[0].axis_label) == ("iteration", "two x")
    assert columns(first) == [{"x": [1, 2], "y": [2, 3], "nr": [1, 2]}]
    assert columns(second) == [{"x": [1], "y": [5], "nr": [1]}]
    hovers = [plot.select_one(HoverTool).tooltips[0][0] for plot in (first, second)]
    assert hovers == ["step", "iteration"]
    assert (one.title, two.title) == ("title of a/one", "title of a/two_x")
    assert "\\u0000" not in json.dumps([one.item, two.item])


def test_a_chart_of_several_curves_within_a_band() -> None:
    band = Curve("usual", [(1, 0.5), (2, 0.6)], [0.1, 0.2], [0.9, 1.0])
    long = Curve("long", [(float(i), i / 7) for i in range(40)])
    around = Curve("around", [(1, 3.0)], [2.0], [4.0])
    chart = metric_chart(metric("m", ends=(None, 2.0)), [long, around], "step", band=band)
    plot = drawn(chart.item)
    usual, first, second = columns(plot)
    assert usual == {"x": [1, 2], "y": [0.5, 0.6], "nr": [1, 2], "low": [0.1, 0.2], "high": [0.9, 1.0]}
    assert first["y"] == [float(f"{i / 7:.6g}") for i in range(40)]
    assert second == {"x": [1], "y": [3], "nr": [1], "low": [2], "high": [4]}
    glyphs = [type(renderer.glyph).__name__ for renderer in plot.renderers]
    assert glyphs == ["VArea", "Line", "Line", "VArea", "Line", "Scatter"]  # few points are dotted
    hovers = [tool for tool in plot.toolbar.tools if isinstance(tool, HoverTool)]
    assert [tuple(hover.tooltips[0]) for hover in hovers] == [("", "long"), ("", "around")]
    (healthy,) = (box for box in plot.center if isinstance(box, BoxAnnotation))
    assert (healthy.top, healthy.level) == (2, "underlay")
    assert "\\u0000" not in json.dumps(chart.item)


def test_a_curve_without_points_is_an_empty_chart() -> None:
    assert columns(drawn(metric_chart(metric("m"), [Curve("", [])], "step").item)) == [{"x": [], "y": [], "nr": []}]
