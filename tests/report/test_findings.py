"""What looks wrong is named, with its numbers; what is healthy is not."""

from __future__ import annotations

import math

import pytest

from src.report.findings import at_end, findings, reached
from src.report.read import RunData
from tests.report.runs import metrics, result


def run_with(rows, **changed):
    return RunData(folder=None, metrics=rows, **changed)


def out_of_range(rows):
    """The findings without the alarms, which look at the way and not at the end."""
    return [found for found in findings(run_with(rows)) if found.what.endswith("out of its healthy range")]


def test_a_healthy_run_has_no_finding():
    assert findings(run_with(metrics(40), result=result())) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rollout/eos_fraction", 0.2), ("rollout/kl", -3.0), ("policy/clip_fraction", 0.9), ("policy/ratio", 2.0),
        ("critic/explained_variance", -1.0), ("policy/old_kl", 3.0), ("policy/entropy", 0.01),
        ("train/skipped_steps", 2.0),
    ],
)  # fmt: skip
def test_a_number_that_ends_out_of_its_range_is_named(name, value):
    """The last four of 40 rows count; before that it may have been anything."""
    rows = metrics(40)
    good = {"policy/ratio": 1.0, "policy/old_kl": 0.01, "train/skipped_steps": 0.0, "rollout/eos_fraction": 1.0}
    healthy = {step: row | {name: value if step <= 36 else good.get(name, 0.5)} for step, row in rows.items()}
    assert out_of_range(healthy) == []
    sick = {step: row | {name: value} if step > 36 else row for step, row in rows.items()}
    (found,) = out_of_range(sick)
    assert found.what.startswith(name)
    assert f"{value:.4g} over the last" in found.numbers
    assert found.cure


def test_gold_that_falls_while_the_score_grows_is_named():
    rows = {s: row | {"rollout/gold": s / 20 if s <= 20 else 2 - s / 20} for s, row in metrics(40).items()}
    (found,) = findings(run_with(rows))
    assert found.what.startswith("gold falls while the score grows")
    both = {s: row | {"rollout/score": row["rollout/gold"]} for s, row in rows.items()}
    assert findings(run_with(both)) == []


def test_a_score_whose_interval_holds_zero_did_not_improve():
    sick = run_with(metrics(40), result=result(score=0.1, interval=(-0.1, 0.3)))
    assert [found.what for found in findings(sick)] == ["the score did not improve"]


def test_a_number_that_is_not_finite_is_named_with_its_rows():
    rows = metrics(40)
    rows[7]["rollout/kl"] = math.nan
    (found,) = findings(run_with(rows))
    assert (found.what, found.numbers) == ("rollout/kl is not finite", "in 1 of 40 rows")


def test_what_was_reached_is_that_of_the_result_or_of_the_rows_so_far():
    done = {figure.name: figure for figure in reached(run_with(metrics(40), result=result()))}
    assert (done["score"].before, done["score"].after) == ("0.050 (-0.050 to 0.150)", "2.000 (1.900 to 2.100)")
    assert done["score"].change == "+2.000 (+1.500 to +2.200)"
    rows = metrics(40)
    last = sum(rows[step]["rollout/score"] for step in (37, 38, 39, 40)) / 4
    (so_far,) = [figure for figure in reached(run_with(rows)) if figure.name == "score"]
    assert (so_far.before, so_far.after) == (f"{rows[1]['rollout/score']:.3f}", f"{last:.3f}")
    assert at_end([1.0, 2.0]) == [2.0]
