"""Prompts for estimators that compare several responses to the same one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from src.data.modules import PromptData
from src.errors import SettingError
from tests.tiny import PROMPTS, TinyCorpus, tokenizer


def data(batch_size: int, samples_per_prompt: int, iterations: int = 4, ptx_coef: float = 0.0) -> PromptData:
    return PromptData(
        TinyCorpus(), tokenizer(), batch_size=batch_size, samples_per_prompt=samples_per_prompt, iterations=iterations,
        eval_prompts=7, eval_batch_size=3, max_prompt_tokens=3, max_text_tokens=12, ptx_coef=ptx_coef, seed=5,
    )  # fmt: skip


def batches(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
    """The prompts of each training batch."""
    return [batch["prompts"] for batch, _, _ in data(*arguments, **options).train_dataloader()]


@pytest.mark.parametrize("samples", [1, 2, 4, 8])
def test_each_prompt_comes_so_many_times_in_a_row(samples: int) -> None:
    """Checklist 52. With everything that belongs to it; group ids are equal within a group and in no other."""
    found = batches(8, samples)
    assert len(found) == 4
    for batch in found:
        assert len(batch["texts"]) == len(batch["ids"]) == 8
        places = range(0, 8, samples)
        firsts = [batch["texts"][place] for place in places]
        assert batch["texts"] == [text for text in firsts for _ in range(samples)]
        assert len(set(firsts)) == 8 // samples  # eight different prompts are there, none twice in a pass
        for row, text in enumerate(batch["texts"]):
            own = tokenizer()(text)["input_ids"][-3:]
            assert batch["ids"][row][batch["mask"][row]].tolist() == own
            assert batch["index"][row] == PROMPTS.index(text)
            assert batch["metadata"][row] == {"row": PROMPTS.index(text)}
        groups = batch["group_ids"].tolist()
        assert sorted(Counter(groups).values()) == [samples] * (8 // samples)
        assert [groups[place] for place in places for _ in range(samples)] == groups


@pytest.mark.parametrize("samples", [2, 4])
def test_the_prompts_are_those_of_smaller_batches_without_repetition(samples: int) -> None:
    """Checklist 52. Every prompt comes once in a pass over the data, and passes differ."""
    grouped = [batch["texts"][::samples] for batch in batches(8, samples, iterations=2 * samples)]
    assert grouped == [batch["texts"] for batch in batches(8 // samples, 1, iterations=2 * samples)]
    flat = [text for batch in grouped for text in batch]
    assert len(flat) == 16
    assert sorted(flat[:8]) == sorted(flat[8:]) == sorted(PROMPTS)
    assert flat[:8] != flat[8:]


def test_texts_of_the_third_loss_are_as_many_as_responses() -> None:
    """Checklist 56. They come in no groups."""
    batch, _, _ = next(iter(data(4, 2, ptx_coef=0.1).train_dataloader()))
    assert batch["prompts"]["ids"].shape[0] == batch["text"]["ids"].shape[0] == 4
    assert len({tuple(row) for row in batch["text"]["ids"].tolist()}) == 4


@pytest.mark.parametrize(("batch_size", "samples"), [(8, 3), (8, 16), (8, 0), (8, -2)])
def test_what_does_not_divide_the_batch_is_refused(batch_size: int, samples: int) -> None:
    with pytest.raises(SettingError, match=r"samples_per_prompt must be (a divisor of|at least 1)"):
        data(batch_size, samples)


def test_held_out_prompts_are_answered_once_each() -> None:
    """The comparison knows nothing of groups."""
    found = [batch["prompts"] for batch in data(8, 4).test_dataloader()]
    assert [len(batch["texts"]) for batch in found] == [3, 3, 1]
    assert [text for batch in found for text in batch["texts"]] == PROMPTS[:7]
    for batch in found:
        assert len(set(batch["group_ids"].tolist())) == len(batch["texts"])
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(7))
