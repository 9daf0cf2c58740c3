"""Tokenizers made from texts: lossless, stable, and nothing added on encoding."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from src.data.tokenizers import byte_level_bpe, word_level

TEXTS = [
    "The acting was superb. The plot was a mess!",
    "Overall, the acting was superb.",
    "It was a mess.",
]
BYTES = byte_level_bpe(TEXTS, vocab_size=280)
WORDS = word_level(TEXTS)
BOTH = pytest.mark.parametrize("tokenizer", [WORDS, BYTES], ids=["words", "bytes"])


def test_vocabulary_is_the_forms_of_the_texts_in_code_point_order() -> None:
    forms = [" The", " a", " acting", " mess", " plot", " superb", " the", " was"]
    forms += ["!", ",", ".", "It", "Overall", "The"]
    expected = {form: index for index, form in enumerate(["<pad>", "<eos>", "<unk>", *forms])}
    assert WORDS.get_vocab() == expected
    assert word_level(TEXTS[::-1]).get_vocab() == expected


def test_tokens_keep_their_leading_space() -> None:
    assert WORDS.tokenize(TEXTS[1]) == ["Overall", ",", " the", " acting", " was", " superb", "."]


@BOTH
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_prompt_plus_response_ids_gives_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    for words in range(1, len(text.split(" "))):
        prompt = " ".join(text.split(" ")[:words])
        ids = tokenizer(prompt)["input_ids"] + tokenizer(text[len(prompt) :])["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("text", TEXTS)
def test_words_of_prompt_and_response_are_the_words_of_the_text(text: str) -> None:
    prompt = " ".join(text.split(" ")[:2])
    assert WORDS(text)["input_ids"] == WORDS(prompt)["input_ids"] + WORDS(text[len(prompt) :])["input_ids"]


def test_words_that_never_occurred_are_unknown() -> None:
    # "acting" occurs only after a space, and a second space is a piece of its own.
    unknown = WORDS.unk_token_id
    assert WORDS("acting")["input_ids"] == [unknown]
    assert WORDS("It  was")["input_ids"] == [*WORDS("It")["input_ids"], unknown, *WORDS(" was")["input_ids"]]


def test_white_space_of_the_texts_is_kept() -> None:
    text = "a  b\nc\td ."
    tokenizer = word_level([text])
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=100, deadline=None)
def test_bytes_are_lossless_on_any_text(text: str) -> None:
    assert BYTES.decode(BYTES(text)["input_ids"]) == text


def test_bytes_learn_merges_of_the_texts() -> None:
    assert len(BYTES) == 280
    assert len(BYTES(TEXTS[0])["input_ids"]) < len(TEXTS[0])
    assert byte_level_bpe(TEXTS, vocab_size=280).get_vocab() == BYTES.get_vocab()


def test_too_few_tokens_for_all_bytes_is_an_error() -> None:
    assert len(byte_level_bpe(TEXTS, vocab_size=258)) == 258
    with pytest.raises(ValueError, match=r"vocab_size must be at least 258 .* but is 257"):
        byte_level_bpe(TEXTS, vocab_size=257)


@BOTH
def test_special_tokens_are_distinct_and_never_added(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.bos_token is None
    assert not {0, 1} & {token for text in TEXTS for token in tokenizer(text)["input_ids"]}
    assert tokenizer("")["input_ids"] == []


def test_unknown_token_only_where_a_text_can_have_one() -> None:
    assert WORDS.unk_token_id == 2
    assert BYTES.unk_token is None


@BOTH
def test_padding_is_on_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tokenizer([TEXTS[2], TEXTS[0]], padding=True)
    short, long = batch["input_ids"]
    padding = len(long) - len(tokenizer(TEXTS[2])["input_ids"])
    assert padding > 0
    assert short[:padding] == [0] * padding
    assert batch["attention_mask"][0] == [0] * padding + [1] * (len(long) - padding)


@BOTH
def test_saved_tokenizer_loads_with_identical_ids(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in [*TEXTS, "An unseen naïve text , with  spaces .\n"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (loaded.padding_side, loaded.pad_token, loaded.eos_token) == ("left", "<pad>", "<eos>")
    assert loaded.unk_token == tokenizer.unk_token
