"""The records: picking rows, and that nobody changes them in passing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import DataError
from src.types import Corpus, Episodes, Experience, PreferencePair, PromptRow, Prompts, Rollout, select

ROWS, PROMPT, RESPONSE = 4, 2, 3


def make_rollout() -> Rollout:
    """Every element tells its row by its tens."""
    tens = 10 * torch.arange(ROWS)
    response = tens.unsqueeze(1) + torch.arange(RESPONSE)
    prompt = tens.unsqueeze(1) + torch.arange(PROMPT)
    return Rollout(
        prompt_ids=prompt,
        prompt_mask=prompt % 3 == 0,
        response_ids=response,
        response_mask=response % 4 != 3,
        behavior_logprobs=-response.float(),
        finished=tens % 20 == 0,
        prompt_index=tens + 5,
        group_ids=tens // 20,
        prompts=tuple(f"prompt {i}" for i in range(ROWS)),
        responses=tuple(f"response {i}" for i in range(ROWS)),
        metadata=tuple({"row": i} for i in range(ROWS)),
        policy_version=17,
    )


def make_experience() -> Experience:
    rollout = make_rollout()
    fields = [f.name for f in dataclasses.fields(Experience) if f.name not in ("rollout", "scores")]
    per_token = {name: rollout.response_ids + 0.01 * i for i, name in enumerate(fields)}
    return Experience(rollout=rollout, scores=torch.arange(float(ROWS)), **per_token)


def assert_rows(chosen: Rollout | Experience, record: Rollout | Experience, rows: list[int]) -> None:
    """Field by field, row by row, descending into the rollout of an experience."""
    assert type(chosen) is type(record)
    for f in dataclasses.fields(record):
        new, old = getattr(chosen, f.name), getattr(record, f.name)
        if isinstance(old, Rollout):
            assert_rows(new, old, rows)
        elif isinstance(old, torch.Tensor):
            assert new.dtype == old.dtype
            assert new.shape == (len(rows), *old.shape[1:])
            assert new.tolist() == [old[row].tolist() for row in rows]
        elif isinstance(old, tuple):
            assert new == tuple(old[row] for row in rows)
        else:
            assert new == old


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(0, ROWS - 1), max_size=6), st.booleans())
def test_select_takes_the_same_rows_of_every_field(rows: list[int], scored: bool) -> None:
    """In any order, repeated or none; what belongs to the whole batch stays."""
    record = make_experience() if scored else make_rollout()
    assert_rows(select(record, torch.tensor(rows, dtype=torch.int64)), record, rows)


def test_selecting_all_rows_gives_the_record_back() -> None:
    record = make_experience()
    assert_rows(select(record, torch.arange(ROWS)), make_experience(), list(range(ROWS)))


def test_a_permutation_and_its_inverse_cancel() -> None:
    """So the passes over shuffled rows lose nothing."""
    record, order = make_experience(), torch.tensor([2, 0, 3, 1])
    assert_rows(select(select(record, order), order.argsort()), record, list(range(ROWS)))


def test_select_leaves_the_record_as_it_was() -> None:
    record = make_experience()
    chosen = select(record, torch.tensor([1, 1]))
    chosen.rewards.fill_(-1)
    chosen.rollout.response_mask.fill_(False)
    assert_rows(record, make_experience(), list(range(ROWS)))


def test_an_experience_counts_its_rows_and_knows_its_mask() -> None:
    record = make_experience()
    assert len(record) == ROWS
    assert len(select(record, torch.tensor([3]))) == 1
    assert record.mask.tolist() == record.rollout.response_mask.tolist()


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_rollout().policy_version = 18  # type: ignore[misc]


def test_metadata_is_not_shared_between_prompt_rows() -> None:
    PromptRow("a").metadata["answer"] = 1
    assert PromptRow("b").metadata == {}


@pytest.mark.parametrize("record", [PreferencePair, Prompts, Rollout, Episodes, Experience])
def test_records_of_several_tensors_or_texts_are_given_by_name(record: type) -> None:
    """By place, chosen and rejected, or advantages and returns, could change places without a word."""
    assert all(f.kw_only for f in dataclasses.fields(record))
    with pytest.raises(TypeError, match="positional"):
        record("a", "b", "c")


def test_a_corpus_of_your_own_defines_only_what_its_stage_reads() -> None:
    class Prompted(Corpus):
        def prompts(self, split: str) -> list[PromptRow]:
            return [PromptRow(split)]

    assert Prompted().prompts("test") == [PromptRow("test")]
    assert Prompted().quality(["a"]) == {}
    with pytest.raises(DataError, match="Prompted has no texts: SFT"):
        Prompted().texts("train")
    with pytest.raises(DataError, match="Prompted has no pairs: the reward model"):
        Prompted().pairs("train")
    with pytest.raises(DataError, match="no prompts: PPO"):
        type("Empty", (Corpus,), {})().prompts("train")
