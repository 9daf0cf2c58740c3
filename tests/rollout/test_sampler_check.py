"""An engine that draws from another distribution than the one that is trained ends the run at the next check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.errors import ModelError
from src.models.roles import Roles
from src.models.weights import restore, snapshot
from src.rollout import experience, kv_cache
from src.rollout.answering import Responses
from src.rollout.engines.local import LocalEngine
from src.rollout.sampler_check import require_agreement
from src.types import Rollout
from tests.matrix.architectures import write
from tests.tiny import FOREIGN_WARNINGS, ScriptedReward, make_maker, make_prompts, make_roles, ragged_rollout, write_lm

pytestmark = FOREIGN_WARNINGS


def make(roles: Roles, maker: experience.ExperienceMaker, version: int = 0) -> None:
    prompts = make_prompts(["the film was", "good", "the music"])
    maker.make(roles, ScriptedReward(), prompts, version, torch.Generator().manual_seed(1))


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
    require_agreement(roles, *shifted(roles, at_one_token(4e-3)), 1.0, "the engine is stale")
    with pytest.raises(ModelError, match=r"differ by 0\.006 nats at most .*\(0\.005 nats at most are .*stale"):
        require_agreement(roles, *shifted(roles, at_one_token(-6e-3)), 1.0, "the engine is stale")
    with pytest.raises(ModelError, match="differ by nan nats"):
        require_agreement(roles, *shifted(roles, at_one_token(torch.nan)), 1.0, "the engine is stale")


def test_a_low_temperature_allows_for_more(roles: Roles) -> None:
    """Differences of logits are divided by it: 0.006 at 0.5 is 0.003 at 1."""
    require_agreement(roles, *shifted(roles, at_one_token(6e-3), 0.5), 0.5, "the engine is stale")
    with pytest.raises(ModelError, match="differ by"):
        require_agreement(roles, *shifted(roles, at_one_token(6e-3), 2.0), 2.0, "the engine is stale")


def test_in_half_precision_the_mean_decides(tmp_path: Path) -> None:
    roles = make_roles(write_lm(tmp_path), dtype="bfloat16")
    require_agreement(roles, *shifted(roles, at_one_token(1.0)), 1.0, "the engine is stale")
    require_agreement(roles, *shifted(roles, torch.full((7, 6), 0.09)), 1.0, "the engine is stale")
    with pytest.raises(ModelError, match=r"by 0\.11 nats on average.*\(0\.1 nats on average are allowed in bfloat16\)"):
        require_agreement(roles, *shifted(roles, torch.full((7, 6), 0.11)), 1.0, "the engine is stale")


def test_autocast_counts_as_half_precision(roles: Roles) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        require_agreement(roles, *shifted(roles, at_one_token(1.0)), 1.0, "the engine is stale")


def test_a_cache_that_is_passed_by_a_wrong_name_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba calls its cache `cache_params`, and ignores one that is called `past_key_values` without an error."""
    roles = make_roles(write(tmp_path, "mamba"))
    make(roles, make_maker())
    monkeypatch.setattr(kv_cache, "cache_name", lambda _: "past_key_values")
    with pytest.raises(
        ModelError,
        match=r"iteration 1: the log-probabilities of a MambaForCausalLM differ by .* does not keep the past exactly",
    ):
        make(roles, make_maker())


class Forgetful(LocalEngine):
    """Serves the weights of the first batch for ever, as an engine that lost a synchronization does."""

    fault = "the engine is stale"

    def __init__(self) -> None:
        self.took: list[int] = []
        self.weights: list[Tensor] = []

    def take(self, roles: Roles, policy_version: int) -> None:
        self.weights = self.weights or snapshot(roles.policy_parameters())
        self.took.append(policy_version)

    def sample(self, roles: Roles, *given: Any) -> Responses:
        present = snapshot(roles.policy_parameters())
        restore(self.weights, roles.policy_parameters())
        try:
            return super().sample(roles, *given)
        finally:
            restore(present, roles.policy_parameters())


def test_a_stale_engine_stops_the_run_at_the_next_check(roles: Roles) -> None:
    """The weights move after the first batch; with a check in every second one the third batch is the first to show."""
    engine = Forgetful()
    maker = make_maker(engine=engine, check_every=2)
    make(roles, maker)
    with torch.no_grad():
        for parameter in roles.policy_parameters():
            parameter.add_(0.1)
    make(roles, maker, version=1)
    with pytest.raises(
        ModelError, match=r"iteration 3: the log-probabilities of a .* differ by .*: the engine is stale"
    ):
        make(roles, maker, version=2)
    assert engine.took == [0, 1, 2]


def test_what_is_measured_does_not_depend_on_the_engine(roles: Roles) -> None:
    """Evaluations and greedy responses come from the sampler of this process, whatever the engine says."""
    maker, prompts = make_maker(engine=Forgetful()), make_prompts(["the film was", "good"])
    for draws in (torch.Generator().manual_seed(2), None):
        maker.sample(roles, "policy", prompts, 0, draws)
    assert maker.engine.took == []


def test_it_comes_back_after_a_resume_and_draws_nothing(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run is a new process with a new maker, whose state has no trace of the check."""
    asked = []

    def remember(*given: Any) -> None:
        before = torch.get_rng_state()
        require_agreement(*given)
        assert torch.equal(before, torch.get_rng_state())
        asked.append(given)

    monkeypatch.setattr(experience, "require_agreement", remember)
    maker = make_maker(check_every=3)
    for batch, checks in enumerate((1, 1, 1, 2)):
        make(roles, maker, version=batch)
        assert len(asked) == checks
    resumed = make_maker(check_every=3)
    resumed.load_state_dict(maker.state_dict())
    make(roles, resumed)
    assert len(asked) == 3
