"""Scores and next-token logprobs against plain transformers, without padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from src.models.adapters import add_adapter
from src.models.forward import next_token_logprobs, sequence_scores
from src.models.loading import load_causal_lm
from src.models.settings import LoraSettings
from tests.models import architectures
from tests.tiny import FOREIGN_WARNINGS, LORA, PAD, gpt2_config, model_settings, seeded, tokenizer

pytestmark = FOREIGN_WARNINGS
ROWS = [[4, 5, 6, 7, 1], [8, 1], [9, 10, 11, 1], [12, 13, 14, 15, 16]]


def padded(rows: list[list[int]], side: str, filler: int = PAD) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + 1
    fill = [[filler] * (width - len(row)) for row in rows]
    empty = [[False] * len(f) for f in fill]
    counted = [[True] * len(row) for row in rows]
    if side == "left":
        return torch.tensor([f + r for f, r in zip(fill, rows, strict=True)]), torch.tensor(
            [e + c for e, c in zip(empty, counted, strict=True)]
        )
    return torch.tensor([r + f for f, r in zip(fill, rows, strict=True)]), torch.tensor(
        [c + e for e, c in zip(empty, counted, strict=True)]
    )


@pytest.mark.parametrize("filler", [PAD, 1, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_is_read_at_the_last_token_whatever_pads(side: str, filler: int) -> None:
    """Checklist 9, 11, 24, 27. Against a plain forward of each row alone."""
    model = seeded(lambda: GPT2ForSequenceClassification(gpt2_config(num_labels=1)), 1).eval()
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
        scores = sequence_scores(model, *padded(ROWS, side, filler))
    assert scores.shape == (4,)
    assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_scores_a_row_the_same_alone_and_among_others(side: str) -> None:
    """Checklist 11, 27. RoBERTa reads its score at the first token, which must not be padding."""
    config = RobertaConfig(
        vocab_size=len(tokenizer()), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, num_labels=1, pad_token_id=PAD, bos_token_id=1, eos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    model = seeded(lambda: RobertaForSequenceClassification(config), 1).eval()
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
        assert_close(sequence_scores(model, *padded(ROWS, side)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_next_token_logprobs_are_minus_the_cross_entropy(side: str) -> None:
    """Checklist 1, 56. A first token is never predicted, and no prediction crosses padding."""
    model = seeded(lambda: GPT2LMHeadModel(gpt2_config()), 1).eval()
    expected = []
    with torch.no_grad():
        for row in ROWS:
            logits = model(input_ids=torch.tensor([row])).logits[0]
            expected.append(-F.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="none"))
        logprobs = next_token_logprobs(model, *padded(ROWS, side, filler=3))
    assert_close(logprobs, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama", "gpt_neox"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_gradients_of_next_token_logprobs_are_those_of_all_logits(
    checkpointing: bool, name: str, lora: LoraSettings | None, side: str, tmp_path: Path
) -> None:
    """Checklist 1, 56. Of every weight that is trained, embeddings that are the head too among them (GPT-2, Qwen2)."""
    lm = load_causal_lm(model_settings(architectures.write(tmp_path, name), dtype="float64"))
    if lora is not None:
        add_adapter(lm, lora, "sft")
        moved_off_zero(lm)
    trained = {n: p for n, p in lm.named_parameters() if p.requires_grad}
    logprobs = next_token_logprobs(lm, *padded(ROWS, side, filler=3), checkpointing=checkpointing)
    rows = [lm(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in ROWS]
    expected = torch.cat(
        [of.gather(1, torch.tensor(row[1:]).unsqueeze(1)).squeeze(1) for of, row in zip(rows, ROWS, strict=True)]
    )
    weights = torch.linspace(-1, 2, len(expected), dtype=torch.float64)
    assert_close(logprobs, expected, atol=1e-10, rtol=0)
    found, wanted = (torch.autograd.grad((weights * x).sum(), list(trained.values())) for x in (logprobs, expected))
    assert_close(dict(zip(trained, found, strict=True)), dict(zip(trained, wanted, strict=True)), atol=1e-9, rtol=1e-9)


def moved_off_zero(lm: PreTrainedModel) -> None:
    """The second matrices of adapters, which begin at 0 and would hide the gradients of the first."""
    draws = torch.Generator().manual_seed(1)
    for name, weight in lm.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3, generator=draws)


def test_no_token_to_predict_gives_no_numbers() -> None:
    """A text of one token, or none at all."""
    lm = seeded(lambda: GPT2LMHeadModel(gpt2_config()), 1).eval()
    ids, mask = torch.tensor([[3, 3, 4], [3, 3, 3]]), torch.tensor([[False, False, True], [False, False, False]])
    assert next_token_logprobs(lm, ids, mask).shape == (0,)
