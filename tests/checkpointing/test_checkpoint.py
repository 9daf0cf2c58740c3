"""Interrupted equals uninterrupted: weights, optimizers, schedules, draws, cursor and controllers, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from src.checkpointing.checkpoint import IterationCheckpoint, checkpoints
from src.errors import SettingError
from src.models.settings import LoraSettings
from src.rollout.kl_controller import AdaptiveKL
from tests.tiny import FOREIGN_WARNINGS, LORA, fit, make_maker, make_module, make_roles, snapshot, write_lm

pytestmark = FOREIGN_WARNINGS

ITERATIONS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


class Kill(Callback):
    """Dies at the start of an iteration, after its rollout, or inside its end."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.iteration:
            raise InterruptedError


class Run:
    """A fit with everything that a checkpoint must carry in use: Adam, schedules, texts, adaptive KL."""

    def __init__(self, base: str, lora: LoraSettings | None, folder: Path, *, kill: int | None = None) -> None:
        self.folder, self.roles = folder, make_roles(base, lora)
        self.controller = AdaptiveKL(0.5, kl_target=0.01, kl_horizon=100)
        module = make_module(self.roles, iterations=ITERATIONS, ptx_coef=0.3, entropy_coef=0.01)
        saved = checkpoints(folder)
        stop = (Kill(kill),) if kill is not None else ()
        torch.manual_seed(len(saved))  # the shared stream must not matter
        self.recorder, self.trainer = None, None
        try:
            self.recorder, self.trainer = fit(
                module, folder, maker=make_maker(kl_controller=self.controller), iterations=ITERATIONS,
                callbacks=(*stop, IterationCheckpoint(str(folder), every=1, keep=9)),
                ckpt_path=saved[-1] if saved else None,
            )  # fmt: skip
        except InterruptedError:
            assert stop

    def tensors(self) -> list[Tensor]:
        return snapshot([*self.roles.policy_parameters(), *self.roles.critic_parameters()])


@pytest.fixture(scope="module")
def wholes(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The uninterrupted runs, and their checkpoints."""
    return {
        "lora": Run(base, LORA, tmp_path_factory.mktemp("lora")),
        "full": Run(base, None, tmp_path_factory.mktemp("full")),
    }


@pytest.mark.parametrize(("kind", "lora", "kill"), [("lora", LORA, 1), ("lora", LORA, 3), ("full", None, 2)])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    base: str, wholes: dict[str, Run], kind: str, lora: LoraSettings | None, kill: int, tmp_path: Path
) -> None:
    """Checklist 61, 32. Killed after 1, 2 or 3 of 4 iterations; the numbers that follow are the same ones."""
    whole = wholes[kind]
    Run(base, lora, tmp_path / "cut", kill=kill)
    assert [path.stem for path in checkpoints(tmp_path / "cut")] == [f"iteration-{i + 1}" for i in range(kill)]
    resumed = Run(base, lora, tmp_path / "cut")
    assert resumed.recorder is not None
    assert whole.recorder is not None
    expected = {step: row for step, row in whole.recorder.by_step().items() if step > kill}
    assert resumed.recorder.by_step() == expected
    assert len(expected) == ITERATIONS - kill
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), resumed.tensors(), strict=True))
    assert resumed.controller.kl_coef == whole.controller.kl_coef
    assert resumed.trainer.global_step == whole.trainer.global_step
    for mine, theirs in zip(resumed.trainer.optimizers, whole.trainer.optimizers, strict=True):
        for a, b in zip(mine.state.values(), theirs.state.values(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in b)


def test_a_run_killed_after_its_last_iteration_learns_no_more(base: str, wholes: dict[str, Run]) -> None:
    """Checklist 62, 61. The last checkpoint holds the end, and taking it up again must not start over."""
    first = wholes["lora"]
    again = Run(base, LORA, first.folder)
    assert again.recorder is not None
    assert again.recorder.rows == []
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), again.tensors(), strict=True))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_checkpoint_holds_trained_tensors_and_nothing_frozen(wholes: dict[str, Run], kind: str) -> None:
    """Checklist 61, 59."""
    run = wholes[kind]
    state = torch.load(checkpoints(run.folder)[-1], weights_only=True)["state_dict"]
    mine = {id(p) for p in [*run.roles.policy_parameters(), *run.roles.critic_parameters()]}
    expected = {f"roles.{name}": p for name, p in run.roles.named_parameters() if id(p) in mine}
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], parameter) for name, parameter in expected.items())


def test_a_checkpoint_of_another_model_is_refused(base: str, wholes: dict[str, Run]) -> None:
    """Checklist 61."""
    with pytest.raises(RuntimeError, match="does not fit this model"):
        Run(base, None, wholes["lora"].folder)


def test_the_newest_checkpoints_are_kept_and_the_last_iteration_is_among_them(base: str, tmp_path: Path) -> None:
    module = make_module(make_roles(base), iterations=5)
    callback = IterationCheckpoint(str(tmp_path / "saved"), every=2, keep=2)
    fit(module, tmp_path, maker=make_maker(), iterations=5, callbacks=(callback,))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["iteration-4.ckpt", "iteration-5.ckpt"]


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for number in (10, 9, 100):
        (tmp_path / f"iteration-{number}.ckpt").touch()
    (tmp_path / "writing.tmp").touch()
    assert [path.stem for path in checkpoints(tmp_path)] == ["iteration-9", "iteration-10", "iteration-100"]


@pytest.mark.parametrize(("every", "keep", "name"), [(0, 1, "every"), (1, 0, "keep")])
def test_settings_that_keep_nothing_are_refused(every: int, keep: int, name: str) -> None:
    with pytest.raises(SettingError, match=name):
        IterationCheckpoint("x", every, keep)


def test_the_best_checkpoint_is_forgotten_by_another_metric(tmp_path: Path) -> None:
    """A gold score of 0.9 is not below a score of 1.7."""
    (tmp_path / "iteration-3.ckpt").touch()
    chosen = IterationCheckpoint(str(tmp_path), 1, 1, "rollout/score")
    chosen.best = (3, 1.7)
    for metric, mode, kept in (
        ("rollout/score", "max", (3, 1.7)),
        ("rollout/gold", "max", None),
        ("rollout/score", "min", None),
    ):
        resumed = IterationCheckpoint(str(tmp_path), 1, 1, metric, mode)
        resumed.load_state_dict(chosen.state_dict())
        assert resumed.best == kept


def test_files_of_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    """Copies as file managers make them, and a folder."""
    for name in (
        "iteration-3.ckpt",
        "iteration-10.ckpt",
        "iteration-3 (copy).ckpt",
        "iteration-3-copy.ckpt",
        "best.ckpt",
    ):
        (tmp_path / name).touch()
    (tmp_path / "iteration-11.ckpt").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["iteration-3.ckpt", "iteration-10.ckpt"]
