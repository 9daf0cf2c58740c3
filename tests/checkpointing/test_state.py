"""Every option with a memory: trained, saved, loaded into fresh objects and trained on equals training in one go."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from src.callbacks.gold import GoldStop
from src.callbacks.samples import SampleTable
from src.checkpointing.checkpoint import IterationCheckpoint, checkpoints
from src.checkpointing.metadata import RunMetadata
from src.config.compose import compose
from src.config.files import options
from src.core.kl import SampledKL, k3
from src.errors import CheckpointError
from src.rollout.kl_controller import DoublingKL
from src.rollout.shaping import IgnoreMissingEos, ScoreShaping
from src.stages.objects import instantiate
from tests.tiny import (
    FOREIGN_WARNINGS,
    LORA,
    ScriptedReward,
    TinyCorpus,
    fit,
    make_maker,
    make_module,
    make_roles,
    snapshot,
    write_lm,
)  # fmt: skip

pytestmark = FOREIGN_WARNINGS
ITERATIONS, KILL = 3, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


class Kill(Callback):
    """Dies when an iteration starts."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == KILL:
            raise InterruptedError


@cache
def composed(group: str, name: str) -> Any:
    return compose(["stage=ppo", f"{group}={name}", "rollout.samples_per_prompt=2"])


def option(group: str, name: str) -> Any:
    """The object of an option, made anew."""
    return instantiate(getattr(composed(group, name).ppo, group), f"ppo.{group}")


class Run:
    """A fit, killed at iteration `KILL` or gone on with, with one option in use."""

    def __init__(self, base: str, folder: Path, group: str, name: str, *, kill: bool = False) -> None:
        made = option(group, name)
        changes: dict[str, Any] = {}
        estimator = made if group == "advantage" else None
        if group == "advantage":
            changes["advantage"] = made
        elif group == "score_scaling":
            changes["shaping"] = ScoreShaping(made, score_clip=None, missing_eos=IgnoreMissingEos())
        elif group == "kl_controller":
            changes["kl_controller"] = made
        self.maker = make_maker(**changes)
        critic = estimator is None or estimator.needs_values
        self.roles = make_roles(base, LORA, critic=critic)
        optional: dict[str, Any] = {} if critic else {"value_loss": None}
        if group == "old_kl_controller":
            optional |= {"old_kl_controller": made, "old_kl": SampledKL(k3)}
        module = make_module(self.roles, iterations=ITERATIONS, **optional)
        self.controller = module.objective.old_kl_controller
        samples = 2 if estimator is not None and estimator.needs_groups else 1
        saved = checkpoints(folder)
        self.samples = SampleTable(str(folder / "samples"), every=1, rows=2)
        callbacks = (*((Kill(),) if kill else ()), self.samples, IterationCheckpoint(str(folder), every=1, keep=9))
        try:
            self.recorder, _ = fit(
                module, folder, maker=self.maker, iterations=ITERATIONS, samples_per_prompt=samples,
                callbacks=callbacks, ckpt_path=saved[-1] if saved else None,
            )  # fmt: skip
        except InterruptedError:
            assert kill

    def state(self) -> Any:
        return self.maker.state_dict(), self.controller.state_dict(), self.samples.state_dict()


@pytest.mark.parametrize(("group", "name"), [
    (group, name) for group in ("advantage", "score_scaling", "kl_controller", "old_kl_controller")
    for name in options(group) if name != "none"
])  # fmt: skip
def test_every_option_goes_on_as_if_nothing_had_happened(base: str, group: str, name: str, tmp_path: Path) -> None:
    """Checklist 61. Rows, weights, memories and samples; also that of options that say they have no memory."""
    whole = Run(base, tmp_path / "whole", group, name)
    Run(base, tmp_path / "cut", group, name, kill=True)
    assert [path.stem for path in checkpoints(tmp_path / "cut")] == ["iteration-1", "iteration-2"]
    resumed = Run(base, tmp_path / "cut", group, name)
    expected = {step: row for step, row in whole.recorder.by_step().items() if step > KILL}
    assert len(expected) == ITERATIONS - KILL
    assert resumed.recorder.by_step() == expected
    one, two = (snapshot([*r.roles.policy_parameters(), *r.roles.critic_parameters()]) for r in (whole, resumed))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert resumed.state() == whole.state()
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole/samples").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut/samples").iterdir()} == files
    assert len(files) == ITERATIONS


def test_a_run_that_the_gold_meter_stopped_stays_stopped(base: str, tmp_path: Path) -> None:
    """Checklist 61. It was killed after the checkpoint of its stop: no iteration may follow."""

    def run() -> list[int]:
        module = make_module(make_roles(base), iterations=5)
        module.gold_reward = ScriptedReward()
        stop = GoldStop(window=1, drop=0.0, patience=1)
        stop._ends = lambda: len(stop.rows) >= 2  # type: ignore[method-assign]
        saved = checkpoints(tmp_path)
        callbacks = (stop, IterationCheckpoint(str(tmp_path), every=10, keep=9))
        recorder, _ = fit(module, tmp_path, maker=make_maker(), iterations=5, callbacks=callbacks,
                          ckpt_path=saved[-1] if saved else None)  # fmt: skip
        return list(recorder.by_step())

    assert run() == [1, 2]
    assert [path.stem for path in checkpoints(tmp_path)] == ["iteration-2"]
    assert run() == []


class MoreRows(TinyCorpus):
    """Other prompts."""

    def prompts(self, split: str) -> Any:
        return super().prompts(split)[::-1]


def recorded(base: str, folder: Path, *, allow: bool = False, **changes: Any) -> list[Any]:
    """The prompts of the iterations of a run with a record, killed after two of three, or gone on with."""
    config = {"stage": "ppo", "ppo": {"num_iterations": ITERATIONS}, "seed": 1}
    saved, seen = checkpoints(folder), []

    class See(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch["prompts"]["texts"])

    module = make_module(make_roles(base), iterations=ITERATIONS, **changes)
    record = RunMetadata(config, {"mine.f": "0"}, "abc", allow)
    callbacks = (record, See(), IterationCheckpoint(str(folder), every=1, keep=9), *(() if saved else (Kill(),)))
    try:
        fit(module, folder, maker=make_maker(), iterations=ITERATIONS, callbacks=callbacks,
            ckpt_path=saved[-1] if saved else None)  # fmt: skip
    except InterruptedError:
        assert not saved
    return seen


def test_other_training_data_are_refused_or_read_from_their_beginning(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Checklist 63, 61."""
    caplog.set_level("INFO", "src")
    recorded(base, tmp_path)
    monkeypatch.setattr("tests.tiny.TinyCorpus", MoreRows)
    with pytest.raises(CheckpointError, match=r"training data \(prompts\) are not those .*allow_config_change=true"):
        recorded(base, tmp_path)
    (third,) = recorded(base, tmp_path, allow=True)
    assert "they are read from their beginning" in caplog.text
    assert third == recorded(base, tmp_path / "fresh")[0]


def test_another_base_is_refused(base: str, tmp_path: Path) -> None:
    """Checklist 61. Of the same shape, so that nothing else would notice."""
    recorded(base, tmp_path / "run")
    other = write_lm(tmp_path / "base", seed=1)
    with pytest.raises(CheckpointError, match=r"other frozen weights \(of its roles\) than this run has") as refused:
        recorded(other, tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert len(recorded(other, tmp_path / "run", allow=True)) == 1


def test_the_record_says_what_wrote_the_checkpoint(base: str, tmp_path: Path) -> None:
    recorded(base, tmp_path)
    checkpoint = torch.load(checkpoints(tmp_path)[-1], weights_only=True)
    assert checkpoint["format"] == 2
    run = checkpoint["run"]
    assert run["code"] == {"mine.f": "0"}
    assert (run["config"]["seed"], run["git_revision"], run["world_size"]) == (1, "abc", 1)
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or run["versions"]["torch"] == torch.__version__
    assert set(run["fingerprints"]) == {"roles", "tokenizer"}
    assert all(len(value) == 64 for value in run["fingerprints"].values())


def test_a_number_that_an_iteration_does_not_log_is_not_logged_again(base: str, tmp_path: Path) -> None:
    """Checklist 61. Lightning repeats the last value; a resumed run does not know it."""

    class Once(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                pl_module.log("once", 1.0, batch_size=1)

    recorder, _ = fit(make_module(make_roles(base)), tmp_path, maker=make_maker(), callbacks=(Once(),))
    assert ["once" in row for row in recorder.by_step().values()] == [True, False]


def test_the_doubled_coefficient_moves_in_these_runs(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the comparison above would say nothing of it."""
    seen: list[float] = []
    update = DoublingKL.update

    def noted(controller: DoublingKL, kl: float, rows: int) -> None:
        update(controller, kl, rows)
        seen.append(controller.kl_coef)

    monkeypatch.setattr(DoublingKL, "update", noted)
    Run(base, tmp_path, "old_kl_controller", "doubling")
    assert len(seen) == ITERATIONS
    assert set(seen) != {option("old_kl_controller", "doubling").kl_coef}
