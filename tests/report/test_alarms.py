"""Each alarm fires on its planted sickness, and alone; all are silent over the metrics of recorded healthy runs."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from src.report.alarms import READ, RULES, fired, replayed

BARE = [f"arithmetic_seed_{seed}" for seed in (10, 2, 3)]
RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.csv"))


def healthy(count: int) -> list[dict[str, float]]:
    rows = []
    for i in range(count):
        grown = 1 - 0.9**i
        rows.append({
            "rollout/score": 2 * grown, "rollout/score_std": 0.5, "rollout/gold": grown, "rollout/kl": 4 * grown,
            "rollout/response_length": 16 + 4 * grown, "rollout/eos_fraction": 1.0, "rollout/distinct": 1.0,
            "policy/ratio": 1.0, "policy/old_kl": 0.01, "policy/clip_fraction": 0.05,
            "policy/entropy": 1.5 - 0.2 * grown, "policy/grad_norm": 0.3, "max_grad_norm": 1.0,
            "critic/explained_variance": 0.6 * grown - 0.1,
        })  # fmt: skip
    return rows


SICK = {  # rule -> from row 30 on
    "not finite": {"policy/loss": math.nan},
    "critic explains nothing": {"critic/explained_variance": -0.1},
    "entropy collapse": {"policy/entropy": 0.02},
    "length creep": {"rollout/response_length": 60.0},
    "KL blow-up": {"rollout/kl": 30.0},
    "KL of impossible sign": {"rollout/kl": -1.0},
    "ratio outliers": {"policy/ratio": 3.0},
    "clipping never happens": {"policy/clip_fraction": 0.0},
    "clipping everywhere": {"policy/clip_fraction": 0.7},
    "scores without variance": {"rollout/score_std": 0.0},
    "gold falls while the score grows": {"rollout/gold": 0.1, "rollout/score": 3.0},
    "responses repeat": {"rollout/distinct": 0.2},
    "EOS vanishes": {"rollout/eos_fraction": 0.1},
    "gradients at the clip": {"policy/grad_norm": 50.0},
}


def test_a_norm_that_clips_nothing_is_no_alarm():
    """`ppo.max_grad_norm=inf`."""
    assert replayed([row | {"max_grad_norm": math.inf} for row in healthy(60)]) == []


def test_every_rule_has_a_sickness_and_reads_what_it_says():
    assert set(SICK) == {rule.name for rule in RULES}
    assert {name for numbers in SICK.values() for name in numbers} - {"policy/loss"} <= set(READ) == set(healthy(1)[0])


@pytest.mark.parametrize("name", SICK)
def test_a_planted_sickness_fires_its_alarm_once_and_no_other(name):
    rows = healthy(60)
    assert replayed(rows) == []
    (alarm,) = replayed([row | SICK[name] if i >= 30 else row for i, row in enumerate(rows)])
    assert alarm.rule.name == name
    assert 30 < alarm.row <= 51
    assert f"{name}: {alarm.numbers}. Likely cause: " in alarm.sentence()


def test_the_other_sign_of_a_kl_that_cannot_be_negative_fires_too():
    rows = [*healthy(9), healthy(10)[9] | {"policy/old_kl": -0.01}]
    assert [alarm.rule.name for alarm in fired(rows)] == ["KL of impossible sign"]


def test_short_responses_are_a_creep_too():
    rows = [
        row | ({"rollout/response_length": 3.0, "rollout/kl": 0.1} if i > 20 else {})
        for i, row in enumerate(healthy(40))
    ]
    assert [alarm.rule.name for alarm in replayed(rows)] == ["length creep"]


def test_a_rule_asks_nothing_of_numbers_that_are_not_there():
    assert replayed([{"rollout/score": 1.0}] * 40) == []
    assert fired([]) == []


def recorded(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v and k != "step"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_healthy_runs_are_silent(path):
    """Ten seeds of each embedded experiment, one with another clip too, and a pretrained model on film reviews.

    In sums with a verifier all problems are about equally hard, so that the critic has nothing to explain: said in
    three of ten seeds, and so.
    """
    rows = recorded(path)
    assert len(rows) >= 30
    so = ["critic explains nothing"] if path.stem in BARE else []
    assert [alarm.rule.name for alarm in replayed(rows)] == so


def test_a_policy_that_knows_the_answers_has_not_collapsed():
    """Entropy falls to nothing: well where the score has risen and settled and answers still differ, else not."""
    known = {"policy/entropy": 0.02, "rollout/score": 3.0, "rollout/score_std": 0.1}
    for change, names in (
        ({}, []),
        ({"rollout/score_std": 0.5}, ["entropy collapse"]),
        ({"rollout/score": -1.0}, ["entropy collapse"]),
        ({"rollout/distinct": 0.5}, ["entropy collapse"]),
    ):
        rows = [row | known | change if i >= 30 else row for i, row in enumerate(healthy(60))]
        assert [alarm.rule.name for alarm in replayed(rows)] == names, change


def test_a_recorded_run_that_went_too_far_is_not():
    """A weak reward model without a KL penalty (docs/results.md)."""
    path = Path(__file__).parent / "recorded" / "sick" / "overoptimization_seed_1.csv"
    names = [alarm.rule.name for alarm in replayed(recorded(path))]
    assert names == ["gold falls while the score grows", "KL blow-up", "critic explains nothing"]


def test_the_replay_has_ten_seeds():
    names = {f"{experiment}_seed_{seed}" for experiment in ("sentiment", "arithmetic") for seed in range(1, 11)}
    assert names < {path.stem for path in RECORDED}


@pytest.mark.parametrize(
    ("name", "row", "rule"),
    [("wrong_sign", 6, "KL of impossible sign"), ("lr_times_30", 5, "KL blow-up"), ("mask_early", 29, "KL blow-up")],
)
def test_recorded_sick_runs_of_the_demo_are_not_silent(name, row, rule):
    """Their first alarm, and after which row; what a mask that is late does, only the bands see."""
    path = Path(__file__).parent / "recorded" / "sick" / f"sentiment_{name}.csv"
    first = replayed(recorded(path))[0]
    assert (first.row, first.rule.name) == (row, rule)
