"""Scores and next-token logprobs against plain transformers, without padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

from src.models.forward import next_token_logprobs, sequence_scores
from tests.tiny import PAD, gpt2_config, seeded, tokenizer

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
