"""Alarms while PPO trains: said once, in the log and to loggers that have alerts; a stop if it is asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.callbacks.alarms import Alarms


class Alerts:
    """A logger with alerts."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def alert(self, title: str, text: str, step: int) -> None:
        self.given.append(f"{title} | {text}")


def trainer(alerts: Alerts, main: bool = True) -> Any:
    loggers = [alerts, object()]
    return SimpleNamespace(should_stop=False, is_global_zero=main, loggers=loggers, callback_metrics={})


def go(alarms: Alarms, trainer: Any, spread: list[float], first: int = 0) -> dict[str, float]:
    """Iterations whose scores have these deviations; returns what the callback logged last."""
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(
        log=lambda name, value, batch_size: logged.update({name: value}), settings=SimpleNamespace(max_grad_norm=1.0)
    )
    rollout = SimpleNamespace(responses=("a", "b", "a", "c"))
    for done, deviation in enumerate(spread, start=first):
        numbers = {"rollout/score_std": deviation, "train/tokens": 9.0, "step": 1.0}
        trainer.callback_metrics = {name: torch.tensor(value) for name, value in numbers.items()}
        alarms.on_train_batch_end(trainer, module, None, {"experience": SimpleNamespace(rollout=rollout)}, done)
    return logged


@pytest.mark.parametrize("stop", [False, True])
def test_an_alarm_is_given_once_with_its_cause_and_ends_training_if_asked(
    stop: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """After five iterations whose scores do not differ."""
    alerts = Alerts()
    run = trainer(alerts)
    assert go(Alarms(stop), run, [0.5, 0.0, 0.0, 0.0, 0.0]) == {"rollout/distinct": 0.75}
    assert (caplog.messages, alerts.given, run.should_stop) == ([], [], False)
    alarms = Alarms(stop)
    go(alarms, run, [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    (message,) = caplog.messages
    assert message.startswith("alarm at iteration 6: scores without variance: ")
    assert message.endswith("ppo.stop_on_alarm is set") == stop
    (alert,) = alerts.given
    assert alert.startswith("scores without variance | iteration 6: ")
    assert run.should_stop == stop


def test_a_resumed_run_gives_the_alarms_of_one_that_was_not_interrupted(caplog: pytest.LogCaptureFixture) -> None:
    whole, cut, again = Alarms(False), Alarms(False), Alarms(False)
    go(whole, trainer(Alerts()), [0.0] * 6)
    expected = [*caplog.messages]
    caplog.clear()
    go(cut, trainer(Alerts()), [0.0] * 3)
    again.load_state_dict(cut.state_dict())
    go(again, trainer(Alerts()), [0.0] * 3, first=3)
    assert caplog.messages == expected != []
    assert again.state_dict() == whole.state_dict()


def test_a_run_that_was_cut_off_after_its_stop_stops_again() -> None:
    stopped, again, free = Alarms(True), Alarms(True), Alarms(False)
    go(stopped, trainer(Alerts()), [0.0] * 5)
    for alarms, expected in ((again, True), (free, False)):
        alarms.load_state_dict(stopped.state_dict())
        run = trainer(Alerts())
        alarms.on_train_start(run, SimpleNamespace())  # type: ignore[arg-type]
        assert run.should_stop == expected


def test_one_rank_tells_and_all_stop(caplog: pytest.LogCaptureFixture) -> None:
    alerts = Alerts()
    run = trainer(alerts, main=False)
    go(Alarms(True), run, [0.0] * 5)
    assert (caplog.messages, alerts.given, run.should_stop) == ([], [], True)
