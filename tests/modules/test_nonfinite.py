"""A loss or gradient that is NaN or infinite: the step is left out or the run ends; no weight and no moment moves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.testing import assert_close

from src.checkpointing.checkpoint import IterationCheckpoint, checkpoints
from src.errors import NonFiniteError
from src.models.roles import Roles
from src.modules.nan_report import summary
from src.modules.ppo import PPOModule
from src.rollout.kl_controller import DoublingKL
from src.types import Experience, Rollout
from src.utils.exits import friendly_errors
from src.utils.nonfinite import FiniteGuard
from tests.modules import test_reward, test_sft
from tests.tiny import (
    FOREIGN_WARNINGS,
    Inject,
    fit,
    make_maker,
    make_module,
    make_roles,
    ragged_experience,
    ragged_rollout,
    same_bits,
    snapshot,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS
BAD = 2  # the row whose logits are NaN


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


def experience_of(roles: Roles) -> Experience:
    rollout = ragged_rollout(rows=8)
    with torch.no_grad():
        return ragged_experience(rollout, roles.distribution(rollout, 1.0).logprobs(), roles.values(rollout))


def poison(roles: Roles, text: list[int], role: str = "policy", when: Callable[[], bool] = lambda: True) -> None:
    """The hidden states of texts that begin like this, and with them their logits and values, are NaN for that role."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if roles._active != role or not when():
            return
        every = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        counted = kwargs["attention_mask"].bool()
        if counted.shape != every.shape:  # sampling goes on from a cache
            return
        for row, (ids, counts) in enumerate(zip(every, counted, strict=True)):
            if ids[counts].tolist()[: len(text)] == text:
                output.last_hidden_state[row] = math.nan

    roles.peft.get_base_model().base_model.register_forward_hook(hook, with_kwargs=True)


def ids_of(rollout: Rollout, row: int) -> list[int]:
    parts = (rollout.prompt_ids, rollout.prompt_mask), (rollout.response_ids, rollout.response_mask)
    return [token for ids, mask in parts for token in ids[row][mask[row]].tolist()]


class Learned:
    """One iteration of two epochs on eight rows in minibatches of four: weights, Adam's state, the logged row."""

    def __init__(self, base: str, folder: Path, role: str | None, skip: int = 9, change: Any = None, **options: Any):
        self.roles = make_roles(base, spread=0.1)
        experience = experience_of(self.roles)
        if role is not None:
            poison(self.roles, ids_of(experience.rollout, BAD), role)
        self.guard = FiniteGuard(skip, str(folder / "nonfinite"))
        self.module = make_module(self.roles, **options)
        self.module.nonfinite = self.guard
        if change is not None:
            change(self.module)
        self.before = snapshot(self.roles.policy_parameters())
        recorder, self.trainer = fit(self.module, folder, iterations=1, callbacks=(Inject(experience),))
        self.logged = recorder.by_step()[1]

    def state(self, role: str) -> tuple[list[Tensor], Any]:
        parameters = {"policy": self.roles.policy_parameters, "critic": self.roles.critic_parameters}[role]()
        return snapshot(parameters), self.trainer.optimizers[("policy", "critic").index(role)].state_dict()


def without_the_bad_row(module: PPOModule) -> None:
    """The same order of minibatches, but for those that the row is in."""
    order = module._order

    def left(*args: Any) -> Iterator[Tensor]:
        return (index for index in order(*args) if BAD not in index.tolist())

    module._order = left


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_step_on_nan_is_left_out_and_nothing_of_it_remains(base: str, role: str, tmp_path: Path) -> None:
    """Weights and Adam's moments are those of a run without these minibatches; the other role learns as ever."""
    with pytest.warns(UserWarning, match=rf"step 1, {role}: .* nan.*nonfinite/000001-{role}-0.jsonl; it is skipped"):
        found = Learned(base, tmp_path, role)
    expected = Learned(base, tmp_path, None, change=without_the_bad_row)
    clean, other = Learned(base, tmp_path, None), "critic" if role == "policy" else "policy"
    assert_close(found.state(role), expected.state(role), rtol=0, atol=0)
    assert_close(found.state(other), clean.state(other), rtol=0, atol=0)
    assert not same_bits(clean.state(role)[0], found.roles.policy_parameters() if role == "policy"
                         else found.roles.critic_parameters())  # fmt: skip
    assert all(math.isfinite(value) for value in found.logged.values())
    assert found.logged["train/skipped_steps"] == 2  # one minibatch of each epoch
    assert clean.logged["train/skipped_steps"] == 0
    assert found.logged[f"{role}/loss"] == expected.logged[f"{role}/loss"]


def test_what_was_left_out_is_written_down(base: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="skipped") as warned:
        Learned(base, tmp_path, "policy")
    assert len([w for w in warned if "skipped" in str(w.message)]) == 1
    files = sorted((tmp_path / "nonfinite").iterdir())
    assert [path.name for path in files] == ["000001-policy-0.jsonl", "000001-policy-1.jsonl"]
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(rows) == 4
    assert {row["prompt"]: row["not_finite"] for row in rows if row["not_finite"]} == {f"p{BAD}": ["logprobs"]}
    for row in rows:
        assert row["response"] == row["prompt"].replace("p", "r")
        assert "policy/loss is nan" in row["what"]
        assert row["advantages"]["min"] <= row["advantages"]["mean"] <= row["advantages"]["max"]
        assert isinstance(row["score"], float)
    assert summary(torch.tensor([1.0, math.nan]))["mean"] == "nan"
    assert summary(torch.tensor([])) == {}


def test_when_no_step_is_finite_nothing_moves(base: str, tmp_path: Path) -> None:
    """Adam holds no moments, and the coefficient of the penalty on KL(old || new) stays."""
    controller = DoublingKL(0.5, kl_target=1e-9)
    with pytest.warns(UserWarning, match="skipped"):
        found = Learned(base, tmp_path, "policy", minibatch_size=8, old_kl_controller=controller, early_stop_kl=1e-9)
    assert same_bits(found.before, found.roles.policy_parameters())
    assert found.state("policy")[1]["state"] == {}
    assert controller.kl_coef == 0.5
    assert "policy/loss" not in found.logged
    assert found.logged["policy/early_stop"] == 0


def test_by_default_the_first_ends_the_run_with_one_sentence(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, friendly_errors([]):
        Learned(base, tmp_path, "policy", skip=0)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: step 1, policy: ")
    assert f"its samples are in {tmp_path}/nonfinite/000001-policy-0.jsonl; nothing was learned from it" in said
    assert "nonfinite.max_skipped_in_a_row=3" in said


def test_a_gradient_that_is_not_finite_though_the_loss_is(base: str, tmp_path: Path) -> None:
    """The backward pass alone fails: no row is to blame, and all are written down."""

    def change(module: PPOModule) -> None:
        next(iter(module.roles.policy_parameters())).register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(NonFiniteError, match=r"step 1, policy: policy/grad_norm is (nan|inf); its samples"):
        Learned(base, tmp_path, None, skip=0, change=change)
    (file,) = (tmp_path / "nonfinite").iterdir()
    assert [json.loads(line)["not_finite"] for line in file.read_text().splitlines()] == [[]] * 4


class At(Callback):
    """Knows the running iteration."""

    now = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.now = batch_idx


def test_the_last_checkpoint_stands_and_the_run_that_goes_on_is_that_of_one_undisturbed(
    base: str, tmp_path: Path
) -> None:
    """Checklist 61. NaN in iteration 3, in the update only; later the same numbers as if it had never been."""

    def train(folder: Path, broken: bool) -> tuple[list[Tensor], dict[int, dict[str, float]]]:
        roles, at, saved = make_roles(base), At(), checkpoints(folder)
        if broken:
            poison(roles, [], when=lambda: at.now == 2 and torch.is_grad_enabled())
        keep = IterationCheckpoint(str(folder), every=1, keep=9)
        module = make_module(roles, iterations=4)
        recorder, _ = fit(module, folder, maker=make_maker(), iterations=4, callbacks=(at, keep),
                          ckpt_path=saved[-1] if saved else None)  # fmt: skip
        return snapshot([*roles.policy_parameters(), *roles.critic_parameters()]), recorder.by_step()

    weights, table = train(tmp_path / "whole", broken=False)
    with pytest.raises(NonFiniteError, match="step 3, policy"):
        train(tmp_path / "broken", broken=True)
    assert [path.stem for path in checkpoints(tmp_path / "broken")] == ["iteration-1", "iteration-2"]
    after, rows = train(tmp_path / "broken", broken=False)
    assert_close(after, weights, rtol=0, atol=0)
    assert rows == {step: row for step, row in table.items() if step > 2}


class Watch(Callback):
    """Weights and Adam's state before and after each step."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def look(self, trainer: Any, pl_module: Any) -> None:
        state = {
            k: {n: x.clone() for n, x in v.items()} for k, v in trainer.optimizers[0].state_dict()["state"].items()
        }
        self.states.append((snapshot([p for p in pl_module.net.parameters() if p.requires_grad]), state))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(trainer, pl_module)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_supervised_stages_leave_it_out_too(base: str, stage: str, skip: int, tmp_path: Path) -> None:
    """Three steps, the second of them on a loss that is NaN: neither weights nor AdamW's state move in it."""
    module: Any = test_sft.make(base, None) if stage == "sft" else test_reward.make()
    module.make_optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)
    module.nonfinite = FiniteGuard(skip, str(tmp_path / "nonfinite"))
    watch, step = Watch(), module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) * (math.nan if batch_idx == 1 else 1.0)
    recorder = test_reward.Recorder()
    trainer = test_reward.trainer(tmp_path, recorder, callbacks=[watch])
    data = test_sft.data(steps=3) if stage == "sft" else test_reward.data(3)
    data.steps = 3
    if skip == 0:
        with pytest.raises(NonFiniteError, match=f"step 2, {stage}: {stage}/grad_norm is nan, {stage}/loss is nan"):
            trainer.fit(module, datamodule=data)
        assert len(watch.states) == 2
    else:
        with pytest.warns(UserWarning, match="skipped"):
            trainer.fit(module, datamodule=data)
        assert_close(watch.states[2], watch.states[1], rtol=0, atol=0)
        for before, after in ((0, 1), (2, 3)):
            assert any(
                not torch.equal(a, b) for a, b in zip(*(watch.states[i][0] for i in (before, after)), strict=True)
            )
        assert [recorder.by_step()[i]["train/skipped_steps"] for i in (1, 2, 3)] == [0, 1, 1]
    rows = [json.loads(x) for x in (tmp_path / f"nonfinite/000002-{stage}-0.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["text"] for row in rows)
