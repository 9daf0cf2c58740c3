"""Texts as a reward model reads them: one end token, the response's tokens, what is cut."""

from __future__ import annotations

import pytest

from src.models.text import encode_completions, response_lengths, shorten
from tests.tiny import EOS, tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ ' we' if m.role == 'user' else ' they' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' they' }}{% endif %}"
)


def ids(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("prompt", ["the film", "", "a bad"])
@pytest.mark.parametrize("response", [" was great .", "", " ."])
def test_response_tokens_are_those_after_the_prompt(prompt: str, response: str) -> None:
    """And the end token always: a word-level tokenizer cuts at words, so both parts can be encoded alone."""
    rows = encode_completions(tokenizer(), [prompt], [response], chat_template=False)
    assert rows == [[*ids(prompt), *ids(response), EOS]]
    assert response_lengths(tokenizer(), [prompt], rows, chat_template=False) == [len(ids(response)) + 1]


def test_a_token_across_the_border_is_the_responses() -> None:
    """`gre` + `at` is the one word `great`: the prompt's own token (unknown) is not what the whole begins with."""
    rows = encode_completions(tokenizer(), ["the gre"], ["at ."], chat_template=False)
    assert rows == [[*ids("the great ."), EOS]]
    assert response_lengths(tokenizer(), ["the gre"], rows, chat_template=False) == [len(ids("the great .")) - 1 + 1]


def test_a_chat_template_writes_the_turns() -> None:
    """The prompt is the user's turn and the opening of the answer; the end token stands once at the end."""
    chat = tokenizer()
    chat.chat_template = TEMPLATE
    rows = encode_completions(chat, [" liked"], [" great ."], chat_template=True)
    assert rows == [[*ids(" we liked they great ."), EOS]]
    assert response_lengths(chat, [" liked"], rows, chat_template=True) == [len(ids(" great .")) + 1]


def test_what_is_too_long_loses_its_beginning_but_not_its_opening_token() -> None:
    row, plain = [EOS, 5, 6, 7, 8], tokenizer()
    assert shorten(row, None, plain) == shorten(row, 5, plain) == row
    assert shorten(row, 3, plain) == [6, 7, 8]
    plain.cls_token = plain.eos_token
    assert shorten(row, 3, plain) == [EOS, 7, 8]
    assert shorten(row[1:], 3, plain) == [6, 7, 8]
