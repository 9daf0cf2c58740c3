"""Models that are done with training, in the roles they had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from src.errors import ModelError
from src.models.inference_roles import load_inference_roles
from src.models.loading import load_causal_lm
from src.models.reward_adapter import RewardAdapter
from tests.tiny import (
    FOREIGN_WARNINGS,
    assert_rows_close,
    make_roles,
    model_settings,
    plain_logprobs,
    ragged_rollout,
    rows_of,
    tokenizer,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A policy, as PPO saves it, and what it started from."""
    folder = tmp_path_factory.mktemp("models")
    base = write_lm(folder / "base")
    make_roles(base, spread=0.3).merged_policy().save_pretrained(folder / "policy")
    return str(folder / "policy"), base


def test_each_role_has_the_logprobs_of_the_model_in_its_folder(folders: tuple[str, str]) -> None:
    roles = load_inference_roles(model_settings(folders[1]), tokenizer(), *folders)
    rollout = ragged_rollout()
    for role, folder in zip(("policy", "reference"), folders, strict=True):
        found = roles.distribution(rollout, 0.8, role).logprobs()
        plain = load_causal_lm(model_settings(folder, fast_cpu=False))
        assert_rows_close(rows_of(found, rollout.response_mask), plain_logprobs(plain, rollout, 0.8), 1e-5)
    assert not any(parameter.requires_grad for parameter in roles.parameters())
    assert roles.policy_parameters() == roles.critic_parameters() == []


def test_what_is_not_there_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    policy, base = folders
    roles = load_inference_roles(model_settings(base), tokenizer(), policy, None)
    with pytest.raises(ModelError, match="this model was loaded without a reference"), roles.acting("reference"):
        pass
    with pytest.raises(RuntimeError, match="without a critic"):
        roles.values(ragged_rollout())
    with pytest.raises(ModelError, match="use reward=learned"):
        roles.add_reward(RewardAdapter.__new__(RewardAdapter))
    assert not roles.save_adapter(tmp_path / "adapter")
    other = write_lm(tmp_path / "other", vocab_size=99)
    with pytest.raises(ModelError, match=r"a vocabulary of 99 tokens, .* they cannot be compared"):
        load_inference_roles(model_settings(base), tokenizer(), policy, other)


def test_the_policy_that_is_handed_out_is_a_copy(folders: tuple[str, str]) -> None:
    roles = load_inference_roles(model_settings(folders[1]), tokenizer(), *folders)
    copy, rollout = roles.merged_policy(), ragged_rollout()
    before = roles.distribution(rollout, 1.0).logprobs()
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert_close(roles.distribution(rollout, 1.0).logprobs(), before)
