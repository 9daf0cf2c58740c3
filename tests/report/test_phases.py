"""Seconds and memory by phase, from the table of a run to its page."""

from __future__ import annotations

from src.report.page import write_page
from src.report.phases import Phase, phase_chart, phases
from tests.report.runs import timing, write_run

TIMING = {
    1: {"time/seconds_policy": 3.0, "time/seconds_rollout": 1.0, "time/peak_gib_policy": 2.0, "time/memory_gib": 1.0},
    2: {"time/seconds_policy": 2.0, "time/seconds_rollout": 1.0, "time/seconds_saving": 1.0},
    3: {"time/seconds_policy": 1.0, "time/seconds_rollout": 1.0, "time/peak_gib_policy": 2.5},
}


def test_phases_come_in_their_order_with_their_part_of_all_seconds():
    assert phases(TIMING) == [
        Phase("rollout", 1.0, 0.3, 3.0, None),
        Phase("policy", 2.0, 0.6, 6.0, 2.5),
        Phase("saving", 1 / 3, 0.1, 1.0, None),
    ]
    assert phases({}) == phases({1: {"time/memory_gib": 1.0}}) == []


def test_the_chart_has_every_phase_in_every_row():
    chart = phase_chart(TIMING)
    assert chart.summary == "rollout from 1 at 1 to 1 at 3; policy from 3 at 1 to 1 at 3; saving from 0 at 1 to 0 at 3"
    long = phase_chart({step: TIMING[1 + step % 3] for step in range(1, 1001)})
    assert len(str(long.item)) < 30_000


def test_the_page_shows_them_and_no_name_of_another_hand(tmp_path):
    mine = {step: row | {"time/seconds_<script>": 1.0} for step, row in timing(5).items()}
    text = write_page(write_run(tmp_path / "run", iterations=5, timing=mine)).read_text(encoding="utf-8")
    (section,) = [part for part in text.split("<section") if 'id="phases"' in part[:20]]
    assert '<th scope="row">policy</th><td>2</td><td>29%</td><td>10.0</td><td>1.50</td>' in section
    assert '<th scope="row">reward</th><td>1</td><td>14%</td><td>5.0</td><td></td>' in section
    assert "script" not in section
    assert "where there is none, it did not rise" in section
