"""The one home of what a logged number means: its page, and the names that the code logs."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from src.report.metrics import Metric, groups, metric_of
from tests.report.page import PAGE, page

ROOT = Path(__file__).parents[2]
UNKNOWN = metric_of("mine/number").meaning
KNOWN = {metric.name for group in groups() for metric in group.metrics}


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.report"


def test_every_number_that_a_run_logs_is_documented(tiny_run):
    folder, _ = tiny_run
    for name in ("metrics.csv", "timing.csv"):
        with (folder / name).open() as file:
            logged = set(next(csv.reader(file))) - {"step"}
        assert logged
        assert [name for name in logged if metric_of(name).meaning == UNKNOWN] == []


def test_every_name_in_the_code_is_documented_and_every_documented_name_is_in_the_code():
    files = [path for path in (ROOT / "src").rglob("*.py") if path.parent.name != "report"]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r'"((?:rollout|policy|critic|train|sft|time)/[a-z_]+)"', sources))
    assert len(named) > 30
    assert named <= KNOWN
    ends = set(re.findall(r'[/"{}]([a-z_]+)"', sources))
    last = {name: name.split("/")[1] for name in KNOWN if not name.endswith("NAME")}
    assert [name for name, end in last.items() if end not in ends] == []


@pytest.mark.parametrize(
    ("ends", "value", "inside"),
    [
        ((0, 1), 0.5, True), ((0, 1), 1.1, False), ((0, None), -0.1, False), ((None, 2), 1, True), (None, 9, True),
        ((0, 0), 0, True), ((0, 0), 1, False),
    ],
)  # fmt: skip
def test_a_range_may_be_open(ends, value, inside):
    metric = Metric(name="a", title="a", unit=None, meaning="", healthy=None, bad=None, range=ends)
    assert metric.inside(value) == inside


def test_a_part_of_a_mixed_reward_and_an_unknown_number_have_names():
    assert metric_of("rollout/score_length").title == "score of a part: length"
    assert metric_of("rollout/score_std").title == "spread of the scores"
    assert metric_of("mine/number").title == "mine/number"
