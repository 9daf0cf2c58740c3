"""Which tokens of a text count, against the prompt and the answer encoded alone."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.functional import cross_entropy

from src.data.texts import collate_texts, encoded_texts
from src.errors import DataError
from src.models.forward import next_token_logprobs
from src.models.loading import load_causal_lm, load_tokenizer
from src.types import PromptRow
from tests.tiny import model_settings, write_lm


class Answers:
    """Two questions with their answers."""

    prompts_of = ("the film was", "a plot with no")
    answers = (" good", " end and no heart")

    def texts(self, split):
        return [p + a for p, a in zip(self.prompts_of, self.answers, strict=True)]

    def prompts(self, split):
        return [PromptRow(prompt) for prompt in self.prompts_of]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


def test_an_answer_counts_with_its_end_token(tokenizer):
    whole = encoded_texts(Answers(), tokenizer, "train", 99, False, 2)
    answers = encoded_texts(Answers(), tokenizer, "train", 99, True, 2)
    assert [text.ids for text in answers] == [text.ids for text in whole]
    assert [text.counted for text in whole] == [len(text.ids) for text in whole]
    for text, prompt in zip(answers, Answers.prompts_of, strict=True):
        alone = tokenizer(prompt)["input_ids"]
        assert text.ids[: len(alone)] == alone
        assert text.counted == len(text.ids) - len(alone)


def test_a_cut_takes_tokens_of_the_answer_away(tokenizer):
    long = encoded_texts(Answers(), tokenizer, "train", 99, True, 2)[1]
    start = len(long.ids) - long.counted
    cut = encoded_texts(Answers(), tokenizer, "train", start + 1, True, 2)[1]
    assert (len(cut.ids), cut.counted) == (start + 1, 1)
    with pytest.raises(DataError, match=rf"^sft.max_tokens={start}: the answers of 1 of 2 texts of the split train"):
        encoded_texts(Answers(), tokenizer, "train", start, True, 2)


def test_the_loss_is_the_cross_entropy_of_the_answers(path, tokenizer):
    """The mean over all answers' tokens of a padded batch, one row at a time by transformers' logits."""
    lm = load_causal_lm(model_settings(path)).eval()
    rows = encoded_texts(Answers(), tokenizer, "train", 99, True, 2)
    batch = collate_texts(tokenizer.pad_token_id, rows, [0, 1])
    with torch.no_grad():
        found = next_token_logprobs(lm, batch["ids"], batch["mask"], batch["counted"])
        expected = []
        for row in rows:
            ids = torch.tensor([row.ids])
            nats = cross_entropy(lm(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            expected += (-nats[-row.counted :]).tolist()
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


class Unrelated(Answers):
    """Prompts of other texts."""

    def prompts(self, split):
        return super().prompts(split)[::-1]


class Fewer(Answers):
    """A text without a prompt."""

    def prompts(self, split):
        return super().prompts(split)[:1]


@pytest.mark.parametrize(("corpus", "number"), [(Unrelated(), 1), (Fewer(), 2)])
def test_texts_that_do_not_begin_with_their_prompts_are_refused(corpus, number, tokenizer):
    said = f"sft.answers_only=true: text {number} of the split train does not begin with the prompt of the same number"
    with pytest.raises(DataError, match=re.escape(said)):
        encoded_texts(corpus, tokenizer, "train", 99, True, 2)
    assert encoded_texts(corpus, tokenizer, "train", 99, False, 2)
