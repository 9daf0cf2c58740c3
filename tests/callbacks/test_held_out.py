"""Measuring the policy on held-out prompts while it trains: no trace in the training, the best policy, the stop."""

from __future__ import annotations

from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.callbacks.held_out import HeldOut
from src.errors import ConfigError, SettingError
from src.loggers.csv import read_table
from src.rollout.evaluation import Answers
from src.runs.start import start
from tests.conftest import TINY_RUN
from tests.tiny import FOREIGN_WARNINGS

pytestmark = FOREIGN_WARNINGS


class Policy(SimpleNamespace):
    """A module whose policy is one number: the iterations it has learned in."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.logged: list[dict[str, float]] = []
        super().__init__(
            roles=SimpleNamespace(policy_parameters=lambda: [self.weight]),
            log_dict=lambda metrics, batch_size: self.logged.append(metrics),
        )


def trained(meter: HeldOut, scores: list[float], policy: Policy, first: int = 0, total: int = 100) -> int | None:
    """The iteration after which a run whose measurements are `scores` is told to stop."""
    trainer: Any = SimpleNamespace(should_stop=False, num_training_batches=total)
    measured = iter(scores)
    meter._answers = lambda *_: Answers(("p",), ("a b",), {"score": [next(measured)], "kl": [1.0]})  # type: ignore[method-assign]
    meter.on_train_start(trainer, policy)  # type: ignore[arg-type]
    for i in range(first, first + len(scores) * meter.every):
        if trainer.should_stop:
            return i
        policy.weight.data.add_(1)
        meter.on_train_batch_end(trainer, policy, None, None, i)  # type: ignore[arg-type]
    return i + 1 if trainer.should_stop else None


def meter(every: int = 2, best: str | None = "score", patience: int | None = 2) -> HeldOut:
    return HeldOut(None, 1, every, best, patience)  # type: ignore[arg-type]


def test_it_stops_when_none_is_better_and_keeps_the_best() -> None:
    """Measured after iterations 2, 4, 6, 8: the best is the second; two without a better one end the run at 8."""
    policy = Policy()
    assert trained(meter(), [0.1, 0.5, 0.4, 0.5], policy) == 8
    assert policy.weight.item() == 4


def test_the_lowest_with_a_minus_sign() -> None:
    policy = Policy()
    assert trained(meter(best="-score"), [0.1, 0.5, 0.4, 0.5], policy) == 6
    assert policy.weight.item() == 2


def test_without_patience_the_last_iteration_returns_to_the_best() -> None:
    policy = Policy()
    assert trained(meter(patience=None), [0.1, 0.5, 0.4], policy, total=6) is None
    assert policy.weight.item() == 4


def test_a_training_that_something_else_ends_returns_to_the_best_too() -> None:
    """An alarm, which comes before it, after the fifth iteration."""
    policy, measuring = Policy(), meter(patience=None)
    trainer: Any = SimpleNamespace(should_stop=False, num_training_batches=100)
    measured = iter([0.1, 0.5])
    measuring._answers = lambda *_: Answers(("p",), ("a b",), {"score": [next(measured)], "kl": [1.0]})  # type: ignore[method-assign]
    for i in range(5):
        policy.weight.data.add_(1)
        trainer.should_stop = i == 4
        measuring.on_train_batch_end(trainer, policy, None, None, i)  # type: ignore[arg-type]
    assert policy.weight.item() == 4


def test_what_is_no_number_is_never_the_best() -> None:
    """A measure of a user's corpus may be none."""
    policy, measuring = Policy(), meter(patience=None, best="odd")
    trainer: Any = SimpleNamespace(should_stop=False, num_training_batches=6)
    measured = iter([nan, 0.1, nan])
    measuring._answers = lambda *_: Answers(("p",), ("a",), {"score": [1.0], "kl": [1.0], "odd": [next(measured)]})  # type: ignore[method-assign]
    for i in range(6):
        policy.weight.data.add_(1)
        measuring.on_train_batch_end(trainer, policy, None, None, i)  # type: ignore[arg-type]
    assert policy.weight.item() == 4


def test_without_a_deciding_measure_the_last_policy_stays() -> None:
    policy = Policy()
    assert trained(meter(best=None, patience=None), [0.5, 0.1], policy, total=4) is None
    assert policy.weight.item() == 4
    assert policy.logged[0]["held_out/score"] == 0.5
    assert policy.logged[0]["held_out/score_low"] == policy.logged[0]["held_out/score_high"] == 0.5


def test_an_interrupted_meter_goes_on() -> None:
    """Four iterations, then the state in a fresh one: it stops where an uninterrupted one does."""
    before, after, policy = meter(), meter(), Policy()
    assert trained(before, [0.1, 0.5], policy) is None
    after.load_state_dict(before.state_dict())
    assert trained(after, [0.4, 0.5], policy, first=4) == 8
    assert policy.weight.item() == 4
    again = meter()
    again.load_state_dict(after.state_dict())
    assert trained(again, [0.9], policy, first=8) == 8  # interrupted just after its stop


def test_an_unknown_measure_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.held_out\.best=gold: the measures are .*kl.*score"):
        trained(meter(best="gold"), [0.1], Policy())


@pytest.mark.parametrize(
    ("name", "values"),
    [("every", {"every": 0}), ("patience", {"patience": 0}), ("best", {"best": None, "patience": 1})],
)
def test_settings_out_of_range_are_refused(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=name):
        meter(**values)


def test_a_run_is_the_same_with_and_without(tiny_run: tuple[Path, str], tmp_path: Path) -> None:
    """To the bit; and what is logged are the figures of that policy on the validation prompts."""
    folder, base = tiny_run
    measured = ["ppo.held_out.every=1", "ppo.held_out.prompts=5", "ppo.num_iterations=2"]
    start([*TINY_RUN, f"model.path={base}", f"log_dir={tmp_path}", "name=measured", *measured])
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "ppo" / "measured" / name).read_bytes()
    table = read_table(tmp_path / "ppo" / "measured" / "metrics.csv")
    plain = read_table(folder / "metrics.csv")
    assert set(table) == set(plain) == {1, 2}
    for row in table.values():
        assert row["held_out/score_low"] <= row["held_out/score"] <= row["held_out/score_high"]
        assert row["held_out/kl"] > 0
    for step, row in plain.items():
        assert {k: v for k, v in table[step].items() if k in row} == row
