"""The gold meter: when it stops, when it does not, and what it draws."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from src.callbacks.gold import GoldCurve, GoldStop
from src.errors import SettingError
from src.loggers.csv import CsvTables


class Policy(SimpleNamespace):
    """A module whose policy is one number: the iterations it has learned in."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1))
        super().__init__(roles=SimpleNamespace(policy_parameters=lambda: [self.weight]))


def stops_at(stop: GoldStop, scores: list[float], gold: list[float], policy: Policy | None = None) -> int | None:
    """The iteration after which a trainer that logs these numbers is told to stop."""
    trainer: Any = SimpleNamespace(should_stop=False, callback_metrics={})
    policy = policy or Policy()
    for i, (score, true) in enumerate(zip(scores, gold, strict=True)):
        trainer.callback_metrics = {"rollout/score": torch.tensor(score), "rollout/gold": torch.tensor(true)}
        stop.on_train_batch_start(trainer, policy, None, i)  # type: ignore[arg-type]
        policy.weight.data.add_(1)
        stop.on_train_batch_end(trainer, policy, None, None, i)  # type: ignore[arg-type]
        if trainer.should_stop:
            return i + 1
    return None


RISING = [0.1 * i for i in range(12)]
TURNING = [0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]  # windows of 2: .1 .5 .8 .65 .45 .25


def test_it_stops_when_gold_falls_while_the_score_rises() -> None:
    """Best window: the third (0.8). The fourth and fifth are lower by more than 0.1: stop after ten iterations."""
    assert stops_at(GoldStop(window=2, drop=0.1, patience=2), RISING, TURNING) == 10
    assert stops_at(GoldStop(window=2, drop=0.1, patience=1), RISING, TURNING) == 8
    assert stops_at(GoldStop(window=2, drop=0.2, patience=1), RISING, TURNING) == 10


def test_it_does_not_stop_while_gold_holds_or_both_fall() -> None:
    assert stops_at(GoldStop(window=2, drop=0.0, patience=1), RISING, RISING) is None
    assert stops_at(GoldStop(window=2, drop=0.1, patience=1), RISING[::-1], TURNING) is None
    assert stops_at(GoldStop(window=2, drop=0.6, patience=1), RISING, TURNING) is None


def test_it_takes_the_policy_back_to_the_one_that_its_best_window_measured_last() -> None:
    """The best window holds iterations 5 and 6; the sixth measures what five updates have made of the policy.

    Without a stop the policy stays what it is.
    """
    policy = Policy()
    stops_at(GoldStop(window=2, drop=0.1, patience=2), RISING, TURNING, policy)
    assert policy.weight.item() == 5
    policy = Policy()
    stops_at(GoldStop(window=2, drop=0.6, patience=2), RISING, TURNING, policy)
    assert policy.weight.item() == len(TURNING)


def test_an_interrupted_meter_goes_on() -> None:
    """Checklist 61. Six iterations, then the state in a fresh one: it stops where an uninterrupted one does."""
    first, second = (GoldStop(window=2, drop=0.1, patience=2) for _ in range(2))
    assert stops_at(first, RISING[:6], TURNING[:6]) is None
    second.load_state_dict(first.state_dict())
    policy = Policy()
    assert stops_at(second, RISING[6:], TURNING[6:], policy) == 4
    assert policy.weight.item() == 5


def test_without_gold_it_says_so() -> None:
    trainer: Any = SimpleNamespace(should_stop=False, callback_metrics={"rollout/score": torch.tensor(1.0)})
    with pytest.raises(RuntimeError, match="gold_reward"):
        GoldStop(1, 0.0, 1).on_train_batch_end(trainer, SimpleNamespace(), None, None, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("window", 0), ("drop", -0.1), ("patience", 0)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=name):
        GoldStop(**({"window": 1, "drop": 0.0, "patience": 1} | {name: value}))


@pytest.mark.parametrize(("moved", "drawn"), [(True, True), (False, False)])
def test_the_curve_is_drawn_when_the_policy_has_moved(tmp_path: Path, moved: bool, drawn: bool) -> None:
    logger = CsvTables(str(tmp_path))
    for step in range(1, 5):
        kl = 0.5 * (step - 1) if moved else 0.0
        logger.log_metrics({"rollout/score": 0.1 * step, "rollout/gold": 0.2, "rollout/kl": kl}, step)
    GoldCurve(str(tmp_path)).on_fit_end(SimpleNamespace(loggers=[logger], is_global_zero=True), SimpleNamespace())  # type: ignore[arg-type]
    assert (tmp_path / "gold.png").exists() == drawn


def test_it_is_drawn_of_a_run_that_is_interrupted_with_a_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: shown.append(figure))
    logger = CsvTables(str(tmp_path))
    trainer: Any = SimpleNamespace(loggers=[logger], is_global_zero=True)
    for step in (1, 2, 3):
        logger.log_metrics({"rollout/score": step, "rollout/gold": 0.1 * step, "rollout/kl": step - 1.0}, step)
    GoldCurve(str(tmp_path)).on_exception(trainer, SimpleNamespace(), KeyboardInterrupt())  # type: ignore[arg-type]
    GoldCurve(str(tmp_path / "no")).on_exception(trainer, SimpleNamespace(), KeyboardInterrupt())  # type: ignore[arg-type]
    (figure,) = shown
    (axis,) = figure.axes
    assert axis.get_title() == f"score and gold over 3 PPO iterations of {tmp_path.name}, each a point"
    assert (axis.get_xlabel()[:3], axis.get_ylabel()) == ("d =", "score, gold")
