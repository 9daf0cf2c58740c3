"""Rollouts through the cache: rows that leave it, prompts computed once, the logprobs of whole forwards."""

from __future__ import annotations

import random

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

from src.rollout import kv_cache
from src.rollout.kv_cache import GrowingLayer, prefill, trimmed
from src.rollout.sampling import Sampler, without_gaps

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
STOPS = torch.tensor([3, 11, 19, 27])


def model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    makers = {
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=60, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False, bos_token_id=1, eos_token_id=1
            )
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **SIZES)),
        "qwen2 with a window": lambda: Qwen2ForCausalLM(
            Qwen2Config(num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1, **SIZES)
        ),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    }
    lm = makers[family]().eval()
    with torch.no_grad():
        lm.get_output_embeddings().weight *= 40  # clear preferences: rounding moves no greedy token
    return lm


def ragged(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(7)
    lengths = torch.randint(3, 13, (rows,), generator=draws)
    mask = torch.arange(12) >= 12 - lengths.unsqueeze(1)
    return torch.where(mask, torch.randint(1, 60, (rows, 12), generator=draws), 0), mask


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in several pieces and buffers that grow several times, at these sizes too."""
    monkeypatch.setattr(kv_cache, "PIECE", 40)
    monkeypatch.setattr(kv_cache, "COLUMNS", 5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen2 with a window", "neox"])
def test_greedy_tokens_are_those_of_generate_while_rows_leave(family: str) -> None:
    """Checklist 2, 7, 10. Ragged prompts, some of them several times, and ragged ends."""
    lm, (ids, mask) = model(family), ragged(10)
    order = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 4, 0, 4])
    ids, mask = ids[order], mask[order]
    tokens, inside, _, finished = Sampler(24, 1.0).sample(lm, ids, mask, STOPS, 0, None)
    with torch.no_grad():
        expected = lm.generate(
            ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=24, pad_token_id=0,
            eos_token_id=STOPS.tolist(),
        )[:, 12:]  # fmt: skip
    assert torch.equal(tokens, expected)
    assert len(set(inside.sum(1).tolist())) > 2
    assert finished.any()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "neox"])
def test_logprobs_of_drawn_tokens_are_those_of_whole_forwards(family: str) -> None:
    """Checklist 2, 3, 14. No row is mixed up with another when rows leave and prompts are shared."""
    lm, (ids, mask) = model(family), ragged(12)
    ids, mask = ids[[*range(12), 3, 3, 8]], mask[[*range(12), 3, 3, 8]]
    with torch.no_grad():
        lm.get_output_embeddings().weight /= 20
    drawn = Sampler(20, 0.8).sample(lm, ids, mask, STOPS, 0, torch.Generator().manual_seed(1))
    tokens, inside, logprobs, _ = drawn
    assert len(set(inside.sum(1).tolist())) > 3
    for row in range(len(ids)):
        prompt, response = ids[row][mask[row]], tokens[row][inside[row]]
        with torch.no_grad():
            logits = lm(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1].double()
        expected = torch.log_softmax(logits / 0.8, dim=-1).gather(1, response.unsqueeze(1)).squeeze(1)
        assert_close(logprobs[row][inside[row]].double(), expected, atol=1e-5, rtol=0)


def test_second_tokens_follow_the_model_after_rows_have_left() -> None:
    """Checklist 14, 15. Chi-square of the third token, given the first two, among samples of one prompt."""
    lm, rows = model("gpt2"), 8000
    with torch.no_grad():
        lm.get_output_embeddings().weight /= 10
    prompt = torch.tensor([[5, 9, 2]])
    stops = torch.arange(40)  # most rows leave early
    ids = prompt.repeat(rows, 1)
    tokens, inside, _, _ = Sampler(3, 1.0).sample(
        lm, ids, torch.ones_like(ids).bool(), stops, 0, torch.Generator().manual_seed(3)
    )
    went_on = tokens[inside.sum(1) >= 2]
    assert 100 < len(went_on) < rows - 100
    with torch.no_grad():
        first = lm(prompt).logits[0, -1].double().softmax(0)
        after = {
            a: lm(torch.cat([prompt, torch.tensor([[a]])], 1)).logits[0, -1].double().softmax(0) for a in range(40, 60)
        }
    expected = rows * sum(first[a] * p for a, p in after.items())
    observed = torch.bincount(went_on[:, 1], minlength=60).double()
    assert (expected >= 5).sum() > 20
    common = expected >= 5
    chi_square = ((observed - expected).square() / expected)[common].sum()
    degrees = int(common.sum())
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_leaving_rows_never_mix_with_others() -> None:
    """A growing layer and a plain one, through the same random appends and departures."""
    rng = random.Random(2)
    for trial in range(20):
        torch.manual_seed(trial)
        grows, plain = GrowingLayer(), DynamicCache().layer_class_to_replicate()
        rows = rng.randint(1, 9)
        for _ in range(12):
            new = torch.randn(2, rows, 2, rng.randint(1, 4), 3)
            got, expected = grows.update(*new), plain.update(*new)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            stays = torch.rand(rows) < 0.8
            stays[rng.randrange(rows)] = True
            kept = without_gaps(stays)
            assert sorted(kept.tolist()) == stays.nonzero().squeeze(1).tolist()
            if rng.random() < 0.2:
                kept = kept.repeat_interleave(2)
            grows.reorder_cache(kept)
            plain.reorder_cache(kept)
            rows = len(kept)


def test_equal_prompts_pass_once() -> None:
    lm, (ids, mask) = model("gpt2"), ragged(3)
    ids, mask = trimmed(ids, mask), trimmed(mask, mask)
    passed = []
    lm.register_forward_pre_hook(lambda _, __, kwargs: passed.append(len(kwargs["input_ids"])), with_kwargs=True)
    with torch.no_grad():
        logits, cache = prefill(lm, ids.repeat(4, 1), mask.repeat(4, 1))
    assert sum(passed) == 3
    assert torch.equal(logits[:3], logits[9:])
    assert cache.layers[0].keys.shape[:3] == (12, 4, int(mask.sum(1).max()))
