"""What a limit of tokens cuts off is said: how many rows, which part, and how long the longest is."""

from __future__ import annotations

import logging

import pytest

from src.data.lengths import cut_rows
from src.data.modules import PairData, TextData
from src.models.loading import load_tokenizer
from src.types import PreferencePair
from tests.tiny import write_lm

TEXTS = {
    "train": ["good", "a plot with no end and no heart", "the film was good"],
    "validation": ["good"],
    "test": ["the film was good", "bad"],
}


class Rows:
    """Texts, and pairs whose chosen texts are these; the rejected one is always short."""

    def texts(self, split):
        return TEXTS[split]

    def pairs(self, split):
        return [PreferencePair(prompt="", chosen=text, rejected="bad") for text in TEXTS[split]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_lm(tmp_path_factory.mktemp("lm")))


def lengths(tokenizer, split):
    """Tokens of each text and one end token, by the tokenizer itself."""
    return [len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS[split]]


def expected(rows, found, limit, part):
    return (
        f"{sum(n > limit for n in found)} of {len(found)} {rows} are longer than {limit} tokens and lose their {part}; "
        f"the longest has {max(found)}"
    )


def said(caplog, make):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="src.data.lengths"):
        make()
    return caplog.messages


def test_a_row_as_long_as_the_limit_keeps_everything():
    assert cut_rows("rows", [3, 4, 5], 4, "end") == (
        "1 of 3 rows are longer than 4 tokens and lose their end; the longest has 5"
    )


def test_texts(tokenizer, caplog):
    """Each split is said when its loader is made, if it loses anything."""
    limit = sorted(lengths(tokenizer, "train"))[1]
    assert lengths(tokenizer, "validation")[0] <= limit
    data = TextData(Rows(), tokenizer, batch_size=1, steps=1, eval_rows=2, max_tokens=limit, seed=1)
    train = expected("texts of the split train", lengths(tokenizer, "train"), limit, "end")
    assert train.startswith("1 of 3")
    assert said(caplog, data.train_dataloader) == [train]
    assert said(caplog, data.val_dataloader) == []
    longest = max(lengths(tokenizer, "test"))
    data.max_tokens = longest - 1
    assert said(caplog, data.test_dataloader) == [
        expected("texts of the split test", lengths(tokenizer, "test"), longest - 1, "end")
    ]


def test_pairs(tokenizer, caplog):
    """Both texts of each pair count."""
    short = len(tokenizer("bad")["input_ids"]) + 1
    found = [*lengths(tokenizer, "train"), short, short, short]
    limit = max(found) - 1
    data = PairData(
        Rows(), tokenizer, chat_template=False, lm_coef=0.0, batch_size=1, steps=1, max_tokens=limit, seed=1
    )
    train = expected("texts of the pairs of the split train", found, limit, "beginning")
    assert train.startswith("1 of 6")
    assert said(caplog, data.train_dataloader) == [train]
    assert said(caplog, data.val_dataloader) == []
    data.max_tokens = max(found)
    assert said(caplog, data.train_dataloader) == []
