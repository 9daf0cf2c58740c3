"""After normalisation the given samples score mean 0, variance 1, in our hands and in plain transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from src.models.loading import ModelError
from src.models.scalar_head import normalise_scores
from src.rewards.learned import score_texts
from tests.tiny import TEXTS, gpt2_config, seeded, tokenizer


def plain_scores(model: torch.nn.Module) -> torch.Tensor:
    """Each text with an end token, one at a time."""
    rows = [[*tokenizer()(text)["input_ids"], 1] for text in TEXTS]
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])


@pytest.mark.parametrize("head_bias", [False, True])
def test_samples_score_mean_zero_and_variance_one(head_bias: bool, tmp_path: Path) -> None:
    """Checklist 24, 25. Also after writing and reading with plain transformers."""
    model = seeded(lambda: GPT2ForSequenceClassification(gpt2_config(num_labels=1)), 2).eval()
    if head_bias:
        model.score = torch.nn.Linear(16, 1)
    torch.nn.init.constant_(model.transformer.ln_f.bias, 0.4)
    raw = plain_scores(model)
    assert abs(raw.mean()) > 0.1  # something to do
    scores = score_texts(model, tokenizer(), TEXTS, batch_size=4)
    normalise_scores(model, float(scores.mean()), float(scores.std()))
    expected = (raw - raw.mean()) / raw.std()
    assert torch.allclose(plain_scores(model), expected, atol=1e-4)
    if not head_bias:
        model.save_pretrained(tmp_path)
        again = plain_scores(AutoModelForSequenceClassification.from_pretrained(tmp_path).eval())
        assert torch.allclose(again, expected, atol=1e-4)
        assert again.mean().item() == pytest.approx(0, abs=1e-4)
        assert again.var().item() == pytest.approx(1, abs=1e-3)


def test_scores_that_do_not_vary_are_refused() -> None:
    """Checklist 24."""
    model = seeded(lambda: GPT2ForSequenceClassification(gpt2_config(num_labels=1)), 2)
    before = model.score.weight.clone()
    for std in (0.0, float("nan")):
        with pytest.raises(ModelError, match="same score"):
            normalise_scores(model, 1.0, std)
    assert torch.equal(model.score.weight, before)


def test_a_model_without_a_bias_to_shift_is_refused_unchanged() -> None:
    """Checklist 24. A refusal must not leave the gain half applied."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1,
        pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    before = model.score.weight.detach().clone()
    with pytest.raises(ModelError, match="neither a head bias"):
        normalise_scores(model, 1.0, 2.0)
    assert torch.equal(model.score.weight, before)
