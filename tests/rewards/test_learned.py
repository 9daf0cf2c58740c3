"""The learned reward against plain forwards of one text at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from src.errors import ModelError, SettingError
from src.rewards.learned import LearnedReward
from tests.tiny import EOS, tokenizer, write_lm, write_reward_model

PROMPTS = ["the film", "a", "we liked the plot", "they loved", "great", ""]
RESPONSES = [" was great .", " bad film , a great cast .", "", " a dull end , we did not .", " .", "the film"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_reward_model(tmp_path_factory.mktemp("reward"), attn_pdrop=0.5, resid_pdrop=0.5)


def plain_scores(folder: str) -> list[float]:
    """Prompt + response + one end token, unpadded, through transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = [*tokenizer()(prompt + response)["input_ids"], EOS]
        with torch.no_grad():
            scores.append(model(input_ids=torch.tensor([ids])).logits[0, 0].item())
    return scores


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_scores_are_those_of_plain_transformers(folder: str, batch_size: int) -> None:
    """Checklist 24, 25, 27. Whatever shares a batch; dropout in the configuration stays off."""
    reward = LearnedReward(folder, batch_size).load()
    reward.train()
    scores = reward.score(PROMPTS, RESPONSES, [{}] * 6)
    assert scores.tolist() == pytest.approx(plain_scores(folder), abs=1e-5)
    assert (scores.shape, scores.dtype, scores.requires_grad) == ((6,), torch.float32, False)


def test_scores_follow_the_order_of_the_texts(folder: str) -> None:
    """Checklist 27."""
    reward, order = LearnedReward(folder, 2).load(), [4, 2, 5, 0, 3, 1]
    straight = reward.score(PROMPTS, RESPONSES, [{}] * 6)
    shuffled = reward.score([PROMPTS[i] for i in order], [RESPONSES[i] for i in order], [{}] * 6)
    assert shuffled.tolist() == pytest.approx(straight[order].tolist(), abs=1e-6)
    assert straight.unique().numel() == 6


def test_a_response_that_ends_by_itself_gets_no_second_end_token(folder: str) -> None:
    """Checklist 24. Text that already ends with the end token scores as the text without it."""
    reward = LearnedReward(folder, 3).load()
    one, two = reward.score(["the film"] * 2, [" was great .", " was great .<eos>"], [{}] * 2).tolist()
    assert one == pytest.approx(two, abs=1e-6)


def test_the_reward_is_frozen_and_stays_in_eval_mode(folder: str) -> None:
    """Checklist 59."""
    reward = LearnedReward(folder, 3).load()
    torch.nn.ModuleList([reward]).train()
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_a_folder_without_a_score_head_is_refused(tmp_path: Path) -> None:
    """Checklist 25."""
    with pytest.raises(ModelError, match="lacks the weights"):
        LearnedReward(write_lm(tmp_path), 3).load()


def test_the_reward_is_in_eval_mode_from_the_start(folder: str) -> None:
    """Checklist 59. Lightning does not call train() at the start of a fit."""
    assert not any(module.training for module in LearnedReward(folder, 3).load().modules())


def test_a_batch_size_of_zero_is_refused(folder: str) -> None:
    with pytest.raises(SettingError, match="batch_size"):
        LearnedReward(folder, 0)


def test_a_reward_that_was_not_loaded_says_so(folder: str) -> None:
    with pytest.raises(ModelError, match=r"the learned reward is not loaded: call load\(\) first"):
        LearnedReward(folder).score(PROMPTS, RESPONSES, [{}] * 6)
