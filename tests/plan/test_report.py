"""The command: what it prints, what fits where, and what it refuses."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from src.config.compose import compose
from src.config.schema import PPORun
from src.errors import ConfigError
from src.memory.estimate import BASE, PREPACKED, SAVING, MemoryEstimate
from src.memory.report import estimate_of
from src.plan import __main__ as command
from src.plan import devices
from src.plan.devices import on_device
from src.plan.iteration import OPTIMIZER, ROLLOUT, SCORING, TRAINING, Ranks, iteration
from src.plan.machine import card
from src.plan.read import roles_of, sizes_of
from src.plan.report import NO_RATES, forecast, report, strategies
from tests.plan.test_work import SHAPE
from tests.tiny import FOREIGN_WARNINGS, write_lm

pytestmark = FOREIGN_WARNINGS


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_lm(tmp_path / "lm", n_layer=4)


def composed(path: str, *overrides: str) -> PPORun:
    run = compose(["model=gpt2", f"model.path={path}", "reward=vader", "model.lora.rank=2", *overrides])
    assert isinstance(run, PPORun)
    return run


def printed(run: PPORun, *options: object) -> str:
    console = Console(width=80, file=io.StringIO())
    for part in report(run, *options):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_seconds_of_the_phases_are_those_of_the_whole(path: str) -> None:
    run = composed(path)
    found = forecast(card("H100"), iteration(roles_of(run, estimate_of(run)), sizes_of(run)), "bfloat16")
    phases = (ROLLOUT, SCORING, TRAINING, OPTIMIZER)
    assert sum(map(found.of, phases)) == pytest.approx(found.total)
    assert min(map(found.of, phases)) > 0


@pytest.mark.slow
def test_every_table_has_its_rows_at_80_columns(path: str) -> None:
    text = printed(composed(path, "model.dtype=bfloat16"), card("H100"), 4, 80, None, None)
    assert all(len(line) <= 80 for line in text.splitlines())
    for row in ("one device", "trainer=ddp", "trainer=fsdp", "rollout", "scoring", "training", "optimizer"):
        assert row in text
    assert NO_RATES in printed(composed(path), None, None, None, None, None)


def test_the_roles_are_those_of_the_run(path: str) -> None:
    def roles(*overrides: str):
        run = composed(path, *overrides)
        return roles_of(run, estimate_of(run))

    plain, top, critic = roles(), roles("model.lora.layers=1"), roles("model.lora.critic_layers=1")
    assert (plain.policy_layers, plain.critic_layers, plain.trunk, plain.reference) == (4, 4, 0, True)
    assert (top.policy_layers, top.critic_layers, top.trunk, top.policy_on_trunk) == (1, 1, 3, True)
    assert (critic.policy_layers, critic.critic_layers, critic.trunk, critic.policy_on_trunk) == (4, 1, 3, False)
    whole, alone = roles("model.lora=null"), roles("advantage=rloo", "rollout.samples_per_prompt=2", "kl=none")
    assert (whole.policy_layers, whole.critic_layers, whole.trunk) == (None, None, 0)
    assert (alone.critic, alone.reference, alone.trunk) == (False, False, 0)
    # adapters of rank 2 on 4 maps of 4 layers: 2 (in + out) numbers each, as the optimizer counts them
    assert plain.updates("policy") == 4 * 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))


def estimated(**phases: int) -> MemoryEstimate:
    weights = {BASE: 1000, "policy": 100, "critic": 100, PREPACKED: 500}
    gradients = {"policy": 100, "critic": 100}
    named = {"rollout: cache": 40, "update of the policy: activations": 700, SAVING: 9000} | phases
    return MemoryEstimate(weights, gradients, {"policy": 200, "critic": 200}, named)


def test_what_a_device_holds_follows_the_strategy(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/distributed.md's table, by hand: 1,200 bytes of weights and 400 of Adam, 100 of gradients in the 700."""
    monkeypatch.setattr(devices, "estimate_of", lambda run, ranks: estimated())
    run, layer = composed(path), 4 * (SHAPE.of_layer + SHAPE.of_head)
    assert on_device(run, SHAPE, Ranks()).bytes == 1600 + 700
    assert on_device(run, SHAPE, Ranks(4)).bytes == 1600 + 700
    sharded = on_device(run, SHAPE, Ranks(4, True))
    assert (sharded.bytes, sharded.phase) == (1600 / 4 + 700 - 75 + layer, "update of the policy")
    monkeypatch.setattr(devices, "estimate_of", lambda run, ranks: estimated(**{"rollout: cache": 10**6}))
    assert on_device(run, SHAPE, Ranks(4, True)).bytes == 1600 / 4 + 10**6 + 1000
    assert on_device(composed(path, "engine=vllm"), SHAPE, Ranks()).bytes == 1600 + 9000 + 10**9  # a model as saved
    away = on_device(composed(path, "engine=vllm_server", "rollout.engine.urls=[http://a]"), SHAPE, Ranks())
    assert away.bytes == 1600 + 700


def test_fits_leaves_a_reserve() -> None:
    held = devices.OnDevice(Ranks(), 9.0e9, "rollout")
    assert (held.fits(10), held.fits(9.9)) == (True, False)


def test_strategies_are_those_that_training_allows(path: str) -> None:
    """docs/distributed.md: engine=vllm serves one process, and shards want engine=local."""
    servers = ["engine=vllm_server", "rollout.engine.urls=[http://a]"]
    found = [strategies(composed(path, *more), 4) for more in ([], servers, ["engine=vllm"])]
    assert found == [[Ranks(), Ranks(4), Ranks(4, True)], [Ranks(), Ranks(4)], [Ranks()]]
    assert strategies(composed(path), None) == [Ranks()]


def test_rows_that_do_not_divide_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="is no multiple of 3 devices"):
        strategies(composed(path), 3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["stage=sft"], "a plan is made for stage=ppo"),
        (["--devices", "0"], "--devices 0 must be greater than 0"),
        (["--card", "B9"], "--card B9 is not known"),
        (["--rates", "nowhere.json"], "nowhere.json does not exist"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["src.plan", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code not in (0, None)
    assert sentence in capsys.readouterr().err.replace("\n", " ")
