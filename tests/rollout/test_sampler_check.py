"""A sampler that draws from another distribution than the one that is trained ends the run at its first batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.errors import ModelError
from src.models.roles import Roles
from src.rollout import experience, kv_cache
from src.rollout.sampler_check import require_agreement
from src.types import Rollout
from tests.matrix.architectures import write
from tests.tiny import FOREIGN_WARNINGS, ScriptedReward, make_maker, make_prompts, make_roles, ragged_rollout, write_lm

pytestmark = FOREIGN_WARNINGS


def make(roles: Roles, maker: experience.ExperienceMaker) -> None:
    prompts = make_prompts(["the film was", "good", "the music"])
    maker.make(roles, ScriptedReward(), prompts, 0, torch.Generator().manual_seed(1))


@pytest.fixture
def roles(tmp_path: Path) -> Roles:
    return make_roles(write_lm(tmp_path))


def shifted(roles: Roles, by: Tensor, temperature: float = 1.0) -> tuple[Rollout, Tensor]:
    """A rollout whose sampler is off by `by` (B, T) nats, and the true logprobs; padding is off by a lot."""
    rollout = ragged_rollout()
    logprobs = roles.distribution(rollout, temperature).logprobs().detach()
    wrong = (logprobs + by).where(rollout.response_mask, 99.0)
    return replace(rollout, behavior_logprobs=wrong), logprobs


def at_one_token(size: float) -> Tensor:
    by = torch.zeros(7, 6)
    by[2, 0] = size
    return by


def test_in_float32_one_token_decides(roles: Roles) -> None:
    require_agreement(roles, *shifted(roles, at_one_token(4e-3)), 1.0)
    with pytest.raises(ModelError, match=r"differ by 0\.006 nats at most between sampling.*\(0\.005 nats at most are "):
        require_agreement(roles, *shifted(roles, at_one_token(-6e-3)), 1.0)
    with pytest.raises(ModelError, match="differ by nan nats"):
        require_agreement(roles, *shifted(roles, at_one_token(torch.nan)), 1.0)


def test_a_low_temperature_allows_for_more(roles: Roles) -> None:
    """Differences of logits are divided by it: 0.006 at 0.5 is 0.003 at 1."""
    require_agreement(roles, *shifted(roles, at_one_token(6e-3), 0.5), 0.5)
    with pytest.raises(ModelError, match="differ by"):
        require_agreement(roles, *shifted(roles, at_one_token(6e-3), 2.0), 2.0)


def test_in_half_precision_the_mean_decides(tmp_path: Path) -> None:
    roles = make_roles(write_lm(tmp_path), dtype="bfloat16")
    require_agreement(roles, *shifted(roles, at_one_token(1.0)), 1.0)
    require_agreement(roles, *shifted(roles, torch.full((7, 6), 0.09)), 1.0)
    with pytest.raises(ModelError, match=r"by 0\.11 nats on average.*\(0\.1 nats on average are allowed in bfloat16\)"):
        require_agreement(roles, *shifted(roles, torch.full((7, 6), 0.11)), 1.0)


def test_autocast_counts_as_half_precision(roles: Roles) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        require_agreement(roles, *shifted(roles, at_one_token(1.0)), 1.0)


def test_a_cache_that_is_passed_by_a_wrong_name_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba calls its cache `cache_params`, and ignores one that is called `past_key_values` without an error."""
    roles = make_roles(write(tmp_path, "mamba"))
    make(roles, make_maker())
    monkeypatch.setattr(kv_cache, "cache_name", lambda _: "past_key_values")
    with pytest.raises(ModelError, match="past of a MambaForCausalLM in a cache, and training"):
        make(roles, make_maker())


def test_it_is_once_per_process_and_draws_nothing(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run is a new process with a new maker, whose state has no trace of the check."""
    asked = []

    def remember(*given: object) -> None:
        before = torch.get_rng_state()
        require_agreement(*given)  # type: ignore[arg-type]
        assert torch.equal(before, torch.get_rng_state())
        asked.append(given)

    monkeypatch.setattr(experience, "require_agreement", remember)
    maker = make_maker()
    make(roles, maker)
    make(roles, maker)
    assert len(asked) == 1
    resumed = make_maker()
    resumed.load_state_dict(maker.state_dict())
    make(roles, resumed)
    assert len(asked) == 2
