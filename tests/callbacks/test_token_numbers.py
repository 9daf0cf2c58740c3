"""The numbers of each token, against whole forwards of the model in float64."""

from __future__ import annotations

import math

import pytest
import torch

from src.callbacks import token_numbers as module_under_test
from src.callbacks.token_numbers import pieces, token_numbers
from src.core.policy_losses import Reinforce
from src.data.tokenizers import byte_level_bpe
from tests.tiny import (
    EOS,
    FOREIGN_WARNINGS,
    make_module,
    make_roles,
    plain_logprobs,
    plain_model,
    ragged_experience,
    ragged_rollout,
    rows_of,
    tokenizer,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory):
    """A policy away from the reference."""
    return make_roles(write_lm(tmp_path_factory.mktemp("lm")), spread=0.3)


@pytest.fixture
def experience():
    """Old log-probabilities near the policy's own."""
    rollout = ragged_rollout()
    draws = torch.Generator().manual_seed(1)
    return ragged_experience(rollout, -3 + torch.randn(7, 6, generator=draws), torch.randn(7, 6, generator=draws))


def test_the_numbers_are_those_of_the_experience_and_of_the_policy_after_the_update(roles, experience) -> None:
    rows = token_numbers(make_module(roles), experience)
    mask = experience.mask
    for name, known in {
        "logprob": experience.old_logprobs,
        "ref_logprob": experience.ref_logprobs,
        "kl": experience.old_logprobs - experience.ref_logprobs,
        "reward": experience.rewards,
        "value": experience.old_values,
        "advantage": experience.advantages,
    }.items():
        for row, expected in zip(rows, rows_of(known, mask), strict=True):
            assert row[name] == pytest.approx(expected, rel=1e-4), name
    now = plain_logprobs(plain_model(roles, "policy"), experience.rollout)
    clipped = 0
    for row, new, old, advantages in zip(
        rows, now, rows_of(experience.old_logprobs, mask), rows_of(experience.advantages, mask), strict=True
    ):
        ratios = [math.exp(a - b) for a, b in zip(new, old, strict=True)]
        assert row["ratio"] == pytest.approx(ratios, rel=1e-3)
        for flag, ratio, advantage in zip(row["clipped"], ratios, advantages, strict=True):
            assert flag == ((ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0))
            clipped += flag
    assert 0 < clipped < mask.sum()


def test_what_a_run_does_not_have_is_absent(roles, experience) -> None:
    """No reference, no critic, no clip."""
    lacking = {name: getattr(experience, name) for name in experience.__dataclass_fields__}
    lacking |= {"ref_logprobs": None, "old_values": None}
    (row, *_) = token_numbers(make_module(roles, policy_loss=Reinforce()), type(experience)(**lacking))
    assert set(row) == {"text", "logprob", "reward", "advantage", "ratio"}


def test_of_a_long_response_the_first_tokens_are_kept(roles, experience, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = token_numbers(make_module(roles), experience)
    monkeypatch.setattr(module_under_test, "LONGEST", 2)
    for row, cut in zip(whole, token_numbers(make_module(roles), experience), strict=True):
        assert cut == {name: values[:2] for name, values in row.items()}


def test_pieces_of_words_are_the_text_with_its_end_token() -> None:
    words = tokenizer()
    ids = [*words("the film was great .")["input_ids"], EOS]
    before = words("we liked")["input_ids"]
    whole = words.decode([*before, *ids], clean_up_tokenization_spaces=False)
    assert words.decode(before) + "".join(pieces(words, before, ids)) == whole
    assert len(pieces(words, before, ids)) == len(ids)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    """é has two bytes and the rocket four; a tokenizer of bytes has a token for each."""
    bytes_alone = byte_level_bpe(["abc"], 258)
    ids = bytes_alone("né🚀x")["input_ids"]
    assert pieces(bytes_alone, [], ids) == ["n", "\ufffd", "é", "\ufffd", "\ufffd", "\ufffd", "🚀", "x"]
