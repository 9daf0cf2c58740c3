"""Logprobs and values that are NaN: the row is named, and never reaches a mean over the batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from src.core.estimators import GreedyBaseline
from src.errors import NonFiniteError
from src.models.roles import Roles
from src.rollout.kl_controller import AdaptiveKL
from src.rollout.shaping import IgnoreMissingEos, Normalize, ScoreShaping
from src.types import Experience
from src.utils.nonfinite import FiniteGuard
from tests.modules.test_nonfinite import poison
from tests.tiny import (
    FOREIGN_WARNINGS,
    PROMPTS,
    ScriptedReward,
    make_maker,
    make_prompts,
    make_roles,
    rows_of,
    tokenizer,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS
BAD = 3
BEGINNING = tokenizer()(PROMPTS[BAD])["input_ids"]  # "they": no other prompt begins so


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


def make(roles: Roles, guard: FiniteGuard | None, **changes: Any) -> tuple[Experience, dict[str, float], Any]:
    shaping = ScoreShaping(Normalize(), score_clip=None, missing_eos=IgnoreMissingEos())
    maker = make_maker(**({"shaping": shaping, "kl_controller": AdaptiveKL(0.1, 1.0, 100)} | changes))
    draws = torch.Generator().manual_seed(2)
    return *maker.make(roles, ScriptedReward(), make_prompts(PROMPTS), 4, draws, guard), maker


def broken(base: str, role: str) -> Roles:
    roles = make_roles(base, spread=0.1)
    poison(roles, BEGINNING, role)
    return roles


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_row_with_nan_is_left_out_before_anything_is_averaged(base: str, role: str, tmp_path: Path) -> None:
    """The other rows have the numbers that they have in a sound model's experience."""
    guard = FiniteGuard(1, str(tmp_path))
    with pytest.warns(UserWarning, match="step 5, experience: the logprobs or values of a response to 'they' is nan"):
        found, measures, maker = make(broken(base, role), guard, whiten_advantages=False)
    whole, _, _ = make(make_roles(base, spread=0.1), None, whiten_advantages=False)
    left = [row for row in range(8) if row != BAD]
    assert found.rollout.prompts == tuple(PROMPTS[row] for row in left)
    for name in ("old_logprobs", "ref_logprobs", "old_values"):
        expected = rows_of(getattr(whole, name), whole.mask)
        assert_close(rows_of(getattr(found, name), found.mask), [expected[row] for row in left], rtol=1e-5, atol=1e-5)
    assert found.scores.tolist() == whole.scores[left].tolist()
    assert measures["rollout/dropped"] == guard.skipped == 1
    assert all(math.isfinite(number) for number in measures.values())
    assert maker.shaping.scaling.state_dict() == pytest.approx(Normalized(found).state())
    assert math.isfinite(maker.kl_controller.kl_coef)
    (file,) = tmp_path.iterdir()
    (row,) = (json.loads(line) for line in file.read_text().splitlines())
    assert row["prompt"] == "they"
    # the reference is the base with the policy's adapter off, and the hook lies on the base
    of_policy = ["behavior_logprobs", "logprobs", "ref_logprobs", "kl"]
    assert row["not_finite"] == (of_policy if role == "policy" else ["values"])


class Normalized:
    """The running moments after the scores of these rows alone."""

    def __init__(self, experience: Experience) -> None:
        self.scaling = Normalize()
        self.scaling.update(experience.scores)

    def state(self) -> dict[str, Any]:
        return self.scaling.state_dict()


def test_whitening_sees_the_other_rows_alone(base: str) -> None:
    """Checklist 38. Mean 0, variance 1 over what is left; one NaN would have made all of it NaN."""
    with pytest.warns(UserWarning, match="skipped"):
        found, _, _ = make(broken(base, "policy"), FiniteGuard(1, None))
    counted = found.advantages[found.mask].double()
    assert counted.mean().item() == pytest.approx(0, abs=1e-6)
    assert counted.var().item() == pytest.approx(1, abs=1e-4)


def test_by_default_the_first_row_ends_the_run_and_is_named(base: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=f"step 5, experience: .*'they' is nan; its samples are in {tmp_path}"):
        make(broken(base, "policy"), FiniteGuard(0, str(tmp_path)))
    with pytest.raises(NonFiniteError, match="'they' is nan"):
        make(broken(base, "critic"), None)


def test_a_model_that_is_nan_throughout_ends_the_run_whatever_is_allowed(base: str) -> None:
    roles = make_roles(base)
    poison(roles, [])
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(NonFiniteError, match="no response has finite"):
        make(roles, FiniteGuard(9, None))


def test_a_greedy_response_from_nan_is_no_baseline(base: str) -> None:
    """ReMax: the sampled response is sound, the greedy one is not."""
    roles, calls = make_roles(base), []
    poison(roles, BEGINNING, when=lambda: bool(calls))
    maker = make_maker(advantage=GreedyBaseline(gamma=1.0))
    sample = maker.sample

    def counting(roles: Any, role: Any, prompts: Any, version: int, generator: Any) -> Any:
        calls.extend([1] * (generator is None))
        return sample(roles, role, prompts, version, generator)

    maker.sample = counting
    with pytest.raises(NonFiniteError, match="greedy response to 'they'"):
        maker.make(roles, ScriptedReward(), make_prompts(PROMPTS), 0, torch.Generator().manual_seed(2))
