"""One step behind: the schedule of policies and prompts, what it leaves unchanged, and that a resume repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from src.callbacks.rollout import RolloutCallback
from src.checkpointing.checkpoint import IterationCheckpoint, checkpoints
from src.core.correction import Truncated
from src.errors import ConfigError, ModelError, SettingError
from src.models.roles import Roles
from src.rollout.engines.local import LocalEngine
from src.rollout.experience import ExperienceMaker
from src.types import Experience
from tests.rollout.test_sampler_check import Forgetful
from tests.tiny import (
    FOREIGN_WARNINGS,
    Recorder,
    fit,
    make_maker,
    make_module,
    make_roles,
    plain_logprobs,
    plain_model,
    rows_of,
    snapshot,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

ITERATIONS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


class Counting(LocalEngine):
    """Remembers which policy each batch was asked of."""

    def __init__(self) -> None:
        self.took: list[int] = []

    def take(self, roles: Roles, policy_version: int) -> None:
        self.took.append(policy_version)


class Keep(Callback):
    """The experience of each iteration, and the policy before its update; dies at the start of one, if asked to."""

    def __init__(self, kill: int | None = None) -> None:
        self.seen: list[Experience] = []
        self.policies: list[Any] = []
        self.kill = kill

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.kill:
            raise InterruptedError
        self.seen.append(batch["experience"])
        self.policies.append(plain_model(pl_module.roles, "policy"))


def train(
    base: str, folder: Path, *, lag: int, lr: float = 0.02, maker: ExperienceMaker | None = None, **options: Any
) -> tuple[Keep, Recorder, Trainer, Roles]:
    keep, roles = Keep(), make_roles(base)
    module = make_module(roles, iterations=ITERATIONS, lr=lr)
    recorder, trainer = fit(
        module, folder, maker=maker or make_maker(check_every=1), iterations=ITERATIONS, lag=lag,
        callbacks=(keep, *options.pop("callbacks", ())), **options,
    )  # fmt: skip
    return keep, recorder, trainer, roles


def test_each_batch_is_sampled_by_the_policy_of_one_update_less(base: str, tmp_path: Path) -> None:
    """It answers the prompts that it would have had; what is old is the policy just before the update.

    The engine is compared in every batch, and never found stale.
    """
    engine = Counting()
    keep, *_ = train(base, tmp_path, lag=1, maker=make_maker(engine=engine, check_every=1))
    in_time, *_ = train(base, tmp_path, lag=0)
    assert [experience.rollout.policy_version for experience in keep.seen] == [0, 0, 1, 2]
    assert engine.took == [0, 0, 1, 2]  # no batch is drawn that nobody learns from
    for iteration, (experience, other) in enumerate(zip(keep.seen, in_time.seen, strict=True)):
        rollout, mask = experience.rollout, experience.mask
        assert torch.equal(rollout.prompt_ids, other.rollout.prompt_ids)
        assert rollout.metadata == other.rollout.metadata
        for logprobs, version in (
            (rollout.behavior_logprobs, rollout.policy_version),
            (experience.old_logprobs, iteration),
        ):
            expected = plain_logprobs(keep.policies[version], rollout)
            for mine, theirs in zip(rows_of(logprobs, mask), expected, strict=True):
                assert mine == pytest.approx(theirs, abs=1e-5)
    moved = (keep.seen[2].rollout.behavior_logprobs - keep.seen[2].old_logprobs)[keep.seen[2].mask].abs().max()
    assert moved > 0.01  # so the comparison is about something


def test_with_a_policy_that_stays_nothing_changes(base: str, tmp_path: Path) -> None:
    """Same prompts, same random numbers: with a learning rate of 0 both schedules see the same bits."""
    (late, *_), (in_time, *_) = (train(base, tmp_path, lag=lag, lr=0.0) for lag in (1, 0))
    for mine, theirs in zip(late.seen, in_time.seen, strict=True):
        assert mine.rollout.responses == theirs.rollout.responses
        for name in ("old_logprobs", "old_values", "advantages", "rewards"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))


def test_the_correction_is_the_ratio_of_the_two_policies(base: str, tmp_path: Path) -> None:
    keep, recorder, *_ = train(base, tmp_path, lag=1, maker=make_maker(correction=Truncated(1.05)))
    first, *later = keep.seen
    assert first.correction is not None
    torch.testing.assert_close(first.correction, first.mask.float(), rtol=0, atol=1e-4)
    for experience in later[1:]:
        ratio = (experience.old_logprobs - experience.rollout.behavior_logprobs).exp()
        expected = ratio.clamp(max=1.05) * experience.mask
        torch.testing.assert_close(experience.correction, expected)
    logged = recorder.by_step()
    assert logged[1]["rollout/behavior_kl"] == pytest.approx(0, abs=1e-6)
    assert logged[3]["rollout/behavior_kl"] > 1e-4
    assert logged[3]["rollout/capped_fraction"] > 0
    assert logged[1]["policy/ratio"] == pytest.approx(1, abs=0.2)


class Run:
    """A run that is killed at the start of an iteration, or goes on from its newest checkpoint."""

    def __init__(self, base: str, folder: Path, kill: int | None = None) -> None:
        self.folder, self.keep, self.roles = folder, Keep(kill), make_roles(base)
        module, saved = make_module(self.roles, iterations=ITERATIONS), checkpoints(folder)
        self.recorder: Recorder | None = None
        try:
            self.recorder, _ = fit(
                module, folder, maker=make_maker(correction=Truncated(2.0)), iterations=ITERATIONS, lag=1,
                callbacks=(self.keep, IterationCheckpoint(str(folder), every=1, keep=9)),
                ckpt_path=saved[-1] if saved else None,
            )  # fmt: skip
        except InterruptedError:
            assert kill is not None

    def tensors(self) -> list[Tensor]:
        return snapshot([*self.roles.policy_parameters(), *self.roles.critic_parameters()])


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(base, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kill", [1, 3])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    base: str, whole: Run, kill: int, tmp_path: Path
) -> None:
    """The batch in flight was sampled by weights that are gone: it is in the checkpoint."""
    Run(base, tmp_path, kill=kill)
    resumed = Run(base, tmp_path)
    assert whole.recorder is not None
    assert resumed.recorder is not None
    expected = {step: row for step, row in whole.recorder.by_step().items() if step > kill}
    assert resumed.recorder.by_step() == expected
    assert len(expected) == ITERATIONS - kill
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), resumed.tensors(), strict=True))
    for mine, theirs in zip(resumed.keep.seen, whole.keep.seen[kill:], strict=True):
        assert mine.rollout.policy_version == theirs.rollout.policy_version
        assert mine.rollout.responses == theirs.rollout.responses
        assert torch.equal(mine.rollout.behavior_logprobs, theirs.rollout.behavior_logprobs)


def test_a_checkpoint_holds_the_batch_that_waits(whole: Run) -> None:
    """The last one holds none; and a run without a lag does not use that of a run that had one."""
    states = [torch.load(path, weights_only=True)["callbacks"] for path in checkpoints(whole.folder)]
    ahead = [state[RolloutCallback(make_maker()).state_key]["ahead"] for state in states]
    assert [found and found["policy_version"] for found in ahead] == [0, 1, 2, None]
    callback = RolloutCallback(make_maker())
    callback.load_state_dict(callback.state_dict() | {"ahead": ahead[0]})
    assert callback.state_dict()["ahead"] is None


def test_a_metric_of_rollouts_chooses_the_checkpoint_of_the_policy_that_sampled(base: str, tmp_path: Path) -> None:
    saved = IterationCheckpoint(str(tmp_path / "saved"), every=1, keep=2, best_metric="rollout/score")
    _, recorder, *_ = train(base, tmp_path, lag=1, callbacks=(saved,))
    scores = {version: recorder.by_step()[version + 2]["rollout/score"] for version in (1, 2)}  # 0 has no checkpoint
    best = max(scores, key=lambda version: scores[version])
    assert saved.best is not None
    assert saved.best == (best, pytest.approx(scores[best]))
    assert (tmp_path / "saved" / "best.ckpt").resolve().name == f"iteration-{best}.ckpt"


def test_a_stale_engine_is_found_when_it_samples(base: str, tmp_path: Path) -> None:
    """Not an iteration later, when every engine is behind."""
    maker = make_maker(engine=Forgetful(), check_every=1)
    with pytest.raises(ModelError, match=r"iteration 2: .* differ by .*: the engine is stale"):
        train(base, tmp_path, lag=1, lr=0.5, maker=maker)


def test_only_what_can_be_done_is_accepted(base: str, tmp_path: Path) -> None:
    for lag in (-1, 2):
        with pytest.raises(SettingError, match="lag"):
            RolloutCallback(make_maker(), lag=lag)
    callback = RolloutCallback(make_maker(), lag=1)
    with pytest.raises(ConfigError, match="PromptData"):
        callback._following(type("Other", (), {"train_dataloader": [1, 2]})())  # type: ignore[arg-type]
