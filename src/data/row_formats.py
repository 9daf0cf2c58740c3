"""From a row to a prompt and its answers: one class per format of a data set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf, isfinite, isnan, nan
from typing import Any, Protocol

from src.data.sources import Row
from src.data.tables import cut_prompt
from src.errors import DataError, require

Message = dict[str, Any]  # {"role": text, "content": text}, and those of FIELDS that it has
Prompt = str | list[Message]
Answer = str | Message  # a message if it has more than text
WRITTEN = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # what an answer may have besides its text
FIELDS = (*WRITTEN, "tool_call_id", "name")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class DroppedRowError(Exception):
    """Why a row is not used, in a few words."""


@dataclass(frozen=True)
class Example:
    """What a format reads in a row; a part that the row has but leaves empty is an empty text."""

    prompt: Prompt | None  # None: a template makes it from the row's columns
    response: Answer | None = None  # an answer for SFT
    chosen: Answer | None = None
    rejected: Answer | None = None
    gap: float | None = None  # how far apart chosen and rejected are, on the scale of their scores


class RowFormat(Protocol):
    """Reads an example, or returns in a few words why the row is dropped, or raises `DroppedRowError` with them.

    Raises `DataError` for a wrong column.
    """

    def read(self, row: Row) -> Example | str:
        """The example of a row, or why there is none."""
        ...


class Columns:
    """Each part has its own column; `a.b` is column b within column a.

    A part is a text or a list of messages {"role", "content"}. If an answer is a list of messages, the last one is the
    answer and the earlier ones are the prompt. Without a column for the prompt, a template must make it.
    """

    def __init__(
        self,
        prompt: str | None = None,
        response: str | None = None,
        chosen: str | None = None,
        rejected: str | None = None,
        chosen_score: str | None = None,
        rejected_score: str | None = None,
    ) -> None:
        """Name the columns; None for a part that the set does not have.

        Raises:
            DataError: One of two columns that belong together is not named.
        """
        for one, other in (
            (("chosen", chosen), ("rejected", rejected)),
            (
                ("chosen_score", chosen_score),
                ("rejected_score", rejected_score),
            ),
        ):
            if (one[1] is None) != (other[1] is None):
                raise DataError(f"data.columns: {one[0]} and {other[0]} belong together: name both columns or none")
        self.prompt, self.response, self.chosen, self.rejected = prompt, response, chosen, rejected
        self.scores = chosen_score, rejected_score

    def read(self, row: Row) -> Example | str:
        """The example of a row; answers to different prompts, and pairs that the scores do not order, are dropped."""
        prompt = None if self.prompt is None else prompt_of(row, self.prompt)
        named = {"response": self.response, "chosen": self.chosen, "rejected": self.rejected}
        parts: dict[str, Any] = {name: prompt_of(row, column) for name, column in named.items() if column is not None}
        contexts = []
        for name, part in parts.items():
            if isinstance(part, list):
                if part and part[-1]["role"] != "assistant":
                    return "no answer"
                contexts.append(part[:-1])
                parts[name] = _answer(part[-1]) if part else ""
        if any(context != contexts[0] for context in contexts):
            return "prompts differ"
        if contexts and contexts[0]:
            prompt = contexts[0]
        gap = self._gap(row)
        if gap is not None and gap <= 0:
            return "scores do not order the pair"
        return Example(prompt, gap=gap, **parts)

    def _gap(self, row: Row) -> float | None:
        if self.scores[0] is None or self.scores[1] is None:
            return None
        better, worse = (_number(row, column) for column in self.scores if column is not None)
        return better - worse


class PrefixPrompt:
    """A whole text: its first `words` words are the prompt, the rest the response.

    White space, and the HTML line breaks of film reviews, become single spaces, so that prompt + response is the text.
    """

    def __init__(self, text: str, words: int) -> None:
        require(words >= 1, "words", words, "at least 1")
        self.text, self.words = text, words

    def read(self, row: Row) -> Example | str:
        """The text in two parts; a text with no more words than the prompt is dropped."""
        part = prompt_of(row, self.text)
        if isinstance(part, list):
            raise DataError(f"{row.where}, column {self.text!r} must be a text, but is a list")
        text = " ".join(part.replace("<br />", " ").split())
        prompt, response = cut_prompt(text, self.words)
        return Example(prompt, response) if response else "too short"


class Dialogues:
    r"""Two dialogues "\n\nHuman: ...\n\nAssistant: ..." that differ only in the last answer (Anthropic/hh-rlhf).

    The turns before it are the prompt, as messages. Source: https://huggingface.co/datasets/Anthropic/hh-rlhf
    """

    def __init__(self, chosen: str, rejected: str) -> None:
        self.chosen, self.rejected = chosen, rejected

    def read(self, row: Row) -> Example | str:
        """The common prompt and both answers; the chosen one is also the response for SFT."""
        chosen, rejected = self._turns(row, self.chosen), self._turns(row, self.rejected)
        if any(not turns or turns[-1]["role"] != "assistant" for turns in (chosen, rejected)):
            return "no answer"
        if chosen[:-1] != rejected[:-1]:
            return "prompts differ"
        better, worse = chosen[-1]["content"], rejected[-1]["content"]
        return Example(chosen[:-1] or "", better, better, worse)

    def _turns(self, row: Row, column: str) -> list[Message]:
        text = prompt_of(row, column)
        if isinstance(text, list):
            raise DataError(f"{row.where}, column {column!r} must be a text, but is a list")
        parts = re.split(r"\n\n(Human|Assistant):", text)
        if parts[0].strip():
            raise DataError(f'{row.where}, column {column!r} must begin with "\\n\\nHuman:", but begins {text[:40]!r}')
        turns = zip(parts[1::2], parts[2::2], strict=True)
        return [{"role": SPEAKERS[who], "content": content.strip()} for who, content in turns]


class Comparisons:
    """A list of two answers and the place of the better one, 0 or 1 (openai/summarize_from_feedback).

    `required`: a row in which this column is empty is dropped (that set mixes posts and articles). A template makes the
    prompt. Source: https://huggingface.co/datasets/openai/summarize_from_feedback
    """

    def __init__(self, answers: str, text: str, choice: str, required: str) -> None:
        self.answers, self.text, self.choice, self.required = answers, text, choice, required

    def read(self, row: Row) -> Example | str:
        """Both answers; the better one is also the response for SFT."""
        if not column(row, self.required):
            return f"no {self.required}"
        answers, choice = column(row, self.answers), column(row, self.choice)
        if not isinstance(answers, list) or len(answers) != 2:
            raise DataError(f"{row.where}, column {self.answers!r} must be a list of two answers, but is {answers!r}")
        if choice not in (0, 1):
            raise DataError(f"{row.where}, column {self.choice!r} must be 0 or 1, but is {choice!r}")
        texts = [prompt_of(Row(row.where, answer), self.text) for answer in answers]
        better, worse = texts[choice], texts[1 - choice]
        assert isinstance(better, str) and isinstance(worse, str)  # noqa: PT018
        return Example(None, better, better, worse)


def column(row: Row, name: str) -> Any:
    """A column, or with dots a column within a column. Raises `DataError` that lists the existing columns."""
    if name in row.columns:
        return row.columns[name]
    node: Any = row.columns
    for part in name.split("."):
        if not isinstance(node, dict) or part not in node:
            there = sorted(node) if isinstance(node, dict) else f"a {type(node).__name__}"
            raise DataError(f"{row.where} has no column {name!r}, only {there}")
        node = node[part]
    return node


def prompt_of(row: Row, name: str) -> Prompt:
    """A text or messages; null and NaN, which stand for what is missing, become an empty text, other numbers a text."""
    value = column(row, name)
    if value is None or isinstance(value, str):
        if re.match(r"""\s*\[\s*\{\s*["'](role|content)["']""", value or ""):
            raise DataError(f"{row.where}, column {name!r} holds messages written as a text: they must be a list")
        return value or ""
    if isinstance(value, list):
        return [_message(row, name, message) for message in value]
    if isinstance(value, float) and isnan(value):
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool) and value not in (inf, -inf):
        return str(value)
    raise DataError(f"{row.where}, column {name!r} must be a text or a list of messages, but is {value!r}")


def has_words(prompt: Prompt) -> bool:
    """Whether a text, or one of the messages, has more than white space."""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return any(text.strip() for text in texts)


def _message(row: Row, name: str, message: Any) -> Message:
    more = {field: message[field] for field in FIELDS if message.get(field)} if isinstance(message, dict) else {}
    content = _text(message.get("content", "" if more else False)) if isinstance(message, dict) else None
    if content is None or not isinstance(message.get("role"), str):
        raise DataError(f"{row.where}, column {name!r}: a message needs a text role and content, but is {message!r}")
    return {"role": message["role"], "content": content, **more}


def _text(content: Any) -> str | None:
    """A message's content: text, null, or parts of text; None for anything else. An image raises `DroppedRowError`."""
    if not isinstance(content, list):
        return "" if content is None else content if isinstance(content, str) else None
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
    for part, text in zip(content, texts, strict=True):
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise DroppedRowError(f"message with content of the type {kind!r}")
    return "".join(texts)


def _answer(message: Message) -> Answer:
    return message if any(field in message for field in WRITTEN) else str(message["content"])


def _number(row: Row, name: str) -> float:
    """A finite number, also as text (as in csv files)."""
    value = column(row, name)
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = nan
    if not isfinite(number):
        raise DataError(f"{row.where}, column {name!r} must be a number, but is {value!r}")
    return number
