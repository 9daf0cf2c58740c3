"""Gain and bias of a score: where they go in each architecture, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from src.errors import ModelError
from src.models.loading import load_tokenizer
from src.models.reward_net import RewardNet
from src.models.scalar_head import BIAS_KEY, output_layer, scale_scores, shift_scores
from src.rewards.learned import LearnedReward
from tests.models.architectures import ALL, write
from tests.tiny import EOS, FOREIGN_WARNINGS, TEXTS

pytestmark = FOREIGN_WARNINGS

IN_CONFIG = {"llama", "qwen2"}  # an RMS norm and a head without bias: nothing in the weights is constant


def rows_of(folder: Path) -> list[list[int]]:
    """Each text with an end token, as the tokenizer in the folder writes it."""
    words = load_tokenizer(str(folder))
    return [[*words(text)["input_ids"], EOS] for text in TEXTS]


def plain_scores(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """One row at a time."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])


def classifier(folder: Path, name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(write(folder, name), num_labels=1).eval()


@pytest.mark.parametrize("name", ALL)
def test_samples_score_mean_zero_and_variance_one(name: str, tmp_path: Path) -> None:
    """Checklist 24, 25. In our hands, as a reward, and in plain transformers (there up to `score_bias`)."""
    net = RewardNet(classifier(tmp_path / "base", name))
    rows = rows_of(tmp_path / "base")
    raw = plain_scores(net.classifier, rows)
    net.normalize(float(raw.mean()), float(raw.std()))
    expected = (raw - raw.mean()) / raw.std()
    tolerance = 2e-6 * max(1.0, float(raw.abs().max() / raw.std()))  # float32 rounds raw scores, which may vary little
    ours = torch.cat([net.scores(torch.tensor([r]), torch.ones(1, len(r)).bool()) for r in rows]).detach()
    assert torch.allclose(ours, expected, atol=tolerance, rtol=0)
    folder = net.save(tmp_path / "run", load_tokenizer(str(tmp_path / "base")))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    constant = getattr(model.config, BIAS_KEY, 0.0)
    assert (constant != 0) == (name in IN_CONFIG)
    assert torch.allclose(plain_scores(model, rows) + constant, expected, atol=4 * tolerance, rtol=0)
    reward = LearnedReward(str(folder), 4).load().score([""] * len(TEXTS), TEXTS, [{}] * len(TEXTS))
    assert torch.allclose(reward, expected, atol=4 * tolerance, rtol=0)
    assert reward.mean().item() == pytest.approx(0, abs=4 * tolerance)


def test_a_second_normalization_is_one_of_the_first_ones_scores(tmp_path: Path) -> None:
    """(r - 1) / 2, then (s - 3) / 4: together (r - 7) / 8."""
    net = RewardNet(classifier(tmp_path, "llama"))
    ids = torch.tensor([[4, 5, EOS]])
    raw = net.scores(ids, torch.ones(1, 3).bool()).item()
    net.normalize(1.0, 2.0)
    net.normalize(3.0, 4.0)
    assert net.scores(ids, torch.ones(1, 3).bool()).item() == pytest.approx((raw - 7) / 8, abs=1e-5)


@pytest.mark.parametrize("std", [0.0, float("nan")])
def test_scores_that_do_not_vary_are_refused_unchanged(std: float, tmp_path: Path) -> None:
    """Checklist 24."""
    net = RewardNet(classifier(tmp_path, "gpt2"))
    before = net.classifier.score.weight.clone()
    with pytest.raises(ModelError, match="same score"):
        net.normalize(1.0, std)
    assert torch.equal(net.classifier.score.weight, before)
    assert net.bias == 0


def test_a_head_with_a_bias_of_its_own_takes_both() -> None:
    """Whatever lies before it."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    model.base_model = model[0]
    x = torch.randn(5, 3)
    with torch.no_grad():
        raw = model[1](model[0](x))
        scale_scores(model, 0.5)
        shift_scores(model, -0.25)  # type: ignore[arg-type]
        assert torch.allclose(model[1](model[0](x)), 0.5 * raw - 0.25, atol=1e-6)


def test_a_model_without_a_scalar_output_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer with one output"):
        output_layer(torch.nn.Linear(3, 2))
