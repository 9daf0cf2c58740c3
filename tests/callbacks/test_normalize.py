"""The SFT policy's samples that gain and bias of a reward model are set on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from src.callbacks.normalize import NormalizeScores
from src.config.compose import compose
from src.errors import ConfigError
from src.rollout.sampling import Sampler
from src.stages.builders import stage_of
from src.types import PromptRow
from tests.tiny import FOREIGN_WARNINGS, PROMPTS, TinyCorpus, model_settings, tokenizer, write_lm

pytestmark = FOREIGN_WARNINGS

CONTEXT, NEW = 48, 6
LONG = " ".join(["the film was long and dull ."] * 20)  # 140 tokens


class LongPrompts(TinyCorpus):
    """The usual prompts, and two that no model of 48 tokens can read."""

    def prompts(self, split: str) -> list[PromptRow]:
        return [PromptRow(text) for text in (*PROMPTS[:3], LONG, *PROMPTS[3:], f"{LONG} the end")]


class Watched(Sampler):
    """A sampler that remembers the prompts of each call."""

    calls: list[tuple[Tensor, Tensor]]

    def sample(self, lm: Any, prompt_ids: Tensor, prompt_mask: Tensor, *others: Any, **named: Any) -> Any:
        self.__dict__.setdefault("calls", []).append((prompt_ids, prompt_mask))
        return super().sample(lm, prompt_ids, prompt_mask, *others, **named)


def test_prompts_are_cut_to_the_context_and_answered_in_batches(tmp_path: Path) -> None:
    """Whole prompts come back for the reward model; each row draws what it draws in a batch of any other size."""
    path, given = write_lm(tmp_path / "lm"), [row.prompt for row in LongPrompts().prompts("train")]
    told = {}
    for size in (3, 100):
        sampler = Watched(NEW, 1.0)
        callback = NormalizeScores(model_settings(path, None), sampler, samples=len(given), seed=4)
        prompts, told[size] = callback._sft_samples(LongPrompts(), size)
        assert prompts == given
        assert [len(ids) for ids, _ in sampler.calls] == ([3, 3, 3, 1] if size == 3 else [10])
        rows = [ids[mask].tolist() for batch in sampler.calls for ids, mask in zip(*batch, strict=True)]
        words = [tokenizer()(prompt)["input_ids"] for prompt in given]
        assert rows == [row[-(CONTEXT - NEW) :] for row in words]
        assert max(map(len, rows)) + NEW == CONTEXT
    assert told[3] == told[100]
    assert len(set(told[3])) > 5


def test_samples_as_long_as_the_context_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    path = write_lm(tmp_path / "lm")
    chosen = ["stage=reward", "experiment=none", "model=gpt2", f"model.path={path}", "trainer.accelerator=cpu"]

    def check(longest: int) -> None:
        stage_of(compose([*chosen, f"reward_model.normalization_max_new_tokens={longest}"])).check()

    check(CONTEXT - 1)
    said = r"^reward_model\.normalization_max_new_tokens=48: must be smaller than 48, which"
    with pytest.raises(ConfigError, match=said):
        check(CONTEXT)
