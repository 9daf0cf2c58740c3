"""The experience of a batch from which samples were dropped, and a run that a reward stops."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from src.checkpointing.checkpoint import IterationCheckpoint, checkpoints
from src.core.estimators import GAE, Estimator, GroupRelative, LeaveOneOut
from src.errors import RewardError
from src.models.roles import Roles
from src.rollout.experience import ExperienceMaker
from src.rollout.scoring import Scorer
from src.types import Experience, Rollout, select
from tests.tiny import (
    FOREIGN_WARNINGS,
    PROMPTS,
    ScriptedReward,
    fit,
    make_maker,
    make_module,
    make_prompts,
    make_roles,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

DROP = Scorer(timeout=None, drop_failed=True)
ESTIMATORS = {
    "gae": GAE(gamma=1.0, lam=0.95, critic_lam=0.95),
    "rloo": LeaveOneOut(),
    "grpo": GroupRelative(group_scale=True),
}


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    return make_roles(write_lm(tmp_path_factory.mktemp("base")), spread=0.1)


class FailsOn:
    """The scripted reward, which fails on these rows of a whole batch: NaN, or an error where `error` is given."""

    def __init__(self, rows: list[int], error: Exception | None = None) -> None:
        self.rows, self.error = rows, error

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        scores = ScriptedReward().score(prompts, responses, metadata)
        bad = [place for place, row in enumerate(metadata) if row["row"] in self.rows]
        if bad and self.error is not None:
            raise self.error
        return [math.nan if place in bad else score for place, score in enumerate(scores)]


class Sampled:
    """Hands out responses that are there already."""

    temperature = 1.0

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def sample(self, *_: Any) -> tuple[Tensor, ...]:
        r = self.rollout
        return r.response_ids, r.response_mask, r.behavior_logprobs, r.finished


def make(
    roles: Roles, reward: Any, estimator: Estimator, groups: list[int], rollout: Rollout | None = None
) -> tuple[Experience, dict[str, float]]:
    """Experience of the eight prompts in these groups; of the responses in `rollout`, where it is given."""
    prompts = dataclasses.replace(make_prompts(PROMPTS), group_ids=torch.tensor(groups))
    changes: dict[str, Any] = {"scorer": DROP, "advantage": estimator}
    if rollout is not None:
        rows = rollout.prompt_index
        prompts, changes["sampler"] = select(prompts, rows), Sampled(rollout)
    maker: ExperienceMaker = make_maker(**changes)
    return maker.make(roles, reward, prompts, 4, torch.Generator().manual_seed(2))


GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("error", [None, KeyError("no such word")], ids=["nan", "raises"])
@pytest.mark.parametrize("dropped", [[2], [0, 5, 6], [4, 5, 6]], ids=str)
def test_the_experience_is_that_of_the_samples_that_are_left(
    roles: Roles, estimator: str, error: Exception | None, dropped: list[int]
) -> None:
    """Checklist 52. A dropped sample leaves its group too; whitening and means never see it."""
    whole, plain = make(roles, ScriptedReward(), ESTIMATORS[estimator], GROUPS)
    experience, measures = make(roles, FailsOn(dropped, error), ESTIMATORS[estimator], GROUPS)
    left = torch.tensor([row for row in range(8) if row not in dropped])
    expected, numbers = make(roles, ScriptedReward(), ESTIMATORS[estimator], GROUPS, select(whole.rollout, left))
    assert (plain["rollout/dropped"], measures["rollout/dropped"]) == (0.0, float(len(dropped)))
    assert experience.rollout.responses == tuple(whole.rollout.responses[row] for row in left.tolist())
    assert torch.equal(experience.rollout.group_ids, torch.tensor(GROUPS)[left])
    for name in ("old_logprobs", "ref_logprobs", "old_values", "scores", "rewards", "advantages", "returns"):
        mine, theirs = getattr(experience, name), getattr(expected, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert experience.advantages.abs().max() > 0.1
    assert {**measures, "rollout/dropped": 0.0} == pytest.approx(numbers, abs=1e-5)
    if estimator != "gae":  # the group that lost some would have other advantages with them
        assert not torch.allclose(experience.advantages, whole.advantages[left], atol=1e-3)


def test_a_sample_alone_in_its_group_has_nothing_to_be_compared_with(roles: Roles) -> None:
    maker = make_maker(scorer=DROP, advantage=LeaveOneOut(), whiten_advantages=False)
    prompts = dataclasses.replace(make_prompts(PROMPTS), group_ids=torch.tensor(GROUPS))
    experience, _ = maker.make(roles, FailsOn([4, 5, 7]), prompts, 0, torch.Generator().manual_seed(2))
    assert experience.rollout.prompt_index.tolist() == [0, 1, 2, 3, 6]
    assert not experience.advantages[4].any()
    assert experience.advantages[:4].any(dim=1).all()


# ----------------------------------------------------------------------------------------------------------- real fits


class FailsOnSome(ScriptedReward):
    """Every third response that it is shown has no score."""

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [math.nan if n % 3 == 1 else s for n, s in enumerate(super().score(prompts, responses, metadata))]


class Sizes(Callback):
    """Keeps the rows of each iteration's experience."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(batch["experience"].rollout.group_ids.tolist())


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_a_fit_goes_on_with_what_is_left_and_counts_what_is_not(estimator: str, tmp_path: Path) -> None:
    """Two prompts of four samples each; rows 1, 4 and 7 of eight fall."""
    changes: dict[str, Any] = {} if estimator == "gae" else {"value_loss": None}
    roles = make_roles(write_lm(tmp_path / "lm"), critic=estimator == "gae")
    module, sizes = make_module(roles, reward=FailsOnSome(), **changes), Sizes()
    maker = make_maker(scorer=DROP, advantage=ESTIMATORS[estimator])
    recorder, _ = fit(module, tmp_path, maker=maker, samples_per_prompt=4, callbacks=(sizes,))
    assert sizes.rows == [[0, 0, 0, 1, 1]] * 2
    for row in recorder.by_step().values():
        assert row["rollout/dropped"] == 3
        assert all(math.isfinite(number) for number in row.values())
    assert sorted(recorder.by_step()) == [1, 2]


class FailsInIteration(ScriptedReward):
    """Works until the iteration of that number."""

    def __init__(self, iteration: int) -> None:
        super().__init__()
        self.iteration = iteration

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        scores = super().score(prompts, responses, metadata)
        return [math.nan] * len(scores) if len(self.calls) >= self.iteration else scores


@pytest.mark.parametrize("drop_failed", [False, True])
def test_a_reward_that_fails_in_iteration_3_leaves_the_checkpoint_of_iteration_2(
    drop_failed: bool, tmp_path: Path
) -> None:
    """Checklist 61. And a run that goes on from it with a reward that works comes to the end."""
    base, saved = write_lm(tmp_path / "lm"), tmp_path / "saved"

    def train(reward: ScriptedReward, ckpt_path: Path | None = None) -> Any:
        keep = IterationCheckpoint(str(saved), every=1, keep=9)
        maker = make_maker(scorer=Scorer(timeout=60.0, drop_failed=drop_failed))
        module = make_module(make_roles(base), reward=reward, iterations=4)
        return fit(module, tmp_path, maker=maker, iterations=4, callbacks=(keep,), ckpt_path=ckpt_path)

    with pytest.raises(RewardError, match="reward FailsInIteration gave nan for prompt"):
        train(FailsInIteration(3))
    assert [path.name for path in checkpoints(saved)] == ["iteration-1.ckpt", "iteration-2.ckpt"]
    assert not (saved / "writing.tmp").exists()
    recorder, _ = train(ScriptedReward(), checkpoints(saved)[-1])
    assert sorted(recorder.by_step()) == [3, 4]
