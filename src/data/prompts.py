"""The text of a prompt: a column, a template over the row's columns, or messages through a chat template."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from src.data.row_formats import WRITTEN, Answer, DroppedRowError, Message, Prompt
from src.data.sources import Row
from src.data.tables import expanded, read_bytes
from src.errors import DataError
from src.models.chat_template import joined, own_template, render
from src.models.endings import PROBE
from src.models.loading import load_tokenizer

ROOT = Path(__file__).parents[2]


class PromptWriter:
    """Writes prompts as text.

    A template file makes plain text from the row's columns. Messages, and with `chat` a plain text as a user's message,
    go through the chat template of the tokenizer or of the file `chat_template`, up to where the answer begins.
    `arguments`: further variables of the chat template, as `enable_thinking`; `trusted`: code in the tokenizer's folder
    may be run.
    """

    def __init__(
        self,
        template: str | None,
        chat: bool,
        system: str | None,
        chat_template: str | None,
        tokenizer: str | None,
        arguments: dict[str, Any] | None = None,
        trusted: bool = False,
    ) -> None:
        self.chat, self.system, self.path, self.trusted = chat, system, tokenizer, trusted
        self.arguments = dict(arguments or {})
        self._after: str | None = None  # what the chat template writes after an answer, filled in with the first one
        self.template = None if template is None else _compiled(template, "data.template")
        self.own_chat_template = None if chat_template is None else _read(chat_template, "data.chat_template")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The policy's tokenizer; None for a model made from scratch, which has none yet."""
        return None if self.path is None else load_tokenizer(self.path, trusted=self.trusted)

    def write(self, prompt: Prompt | None, row: Row) -> tuple[str, list[Message] | None]:
        """The prompt's text, and its messages if it is a chat.

        Raises `DataError` that names the row, and `DroppedRowError` for messages that the chat template does not serve.
        """
        if self.template is not None:
            prompt = self._fill(row)
        if prompt is None:
            raise DataError("the data has no prompts: name their column (data.columns.prompt) or give data.template")
        if isinstance(prompt, str) and not self.chat:
            if self.system is not None:
                raise DataError(f"data.system={self.system!r}: plain text has no system message; add data.chat=true")
            return prompt, None
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if messages and messages[-1]["role"] == "assistant":
            raise DroppedRowError("prompt that ends with the assistant's turn")
        if self.system is not None and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        text = self._render(messages, row, opens=True)
        self._check_all_is_written(messages, text, row)
        return text, messages

    def _fill(self, row: Row) -> str:
        assert self.template is not None
        try:
            return self.template.render(**row.columns)
        except Exception as error:  # whatever a template raises: it divides by zero, recurses without end, ...
            raise DataError(
                f"{row.where}: data.template cannot be filled: {_why(error)}; the columns are {sorted(row.columns)}"
            ) from error

    def follow(self, prompt: str, answer: Answer, messages: list[Message] | None, row: Row) -> str:
        """The answer as it follows the prompt; "" for an empty one.

        In a chat it is what the chat template writes of it after the prompt, up to the end of the turn; otherwise one
        space is put before it, as a word with its space is one token of most tokenizers. Raises as `write` does.
        """
        if messages is None:
            if not isinstance(answer, str):
                raise DroppedRowError("answer with more than text outside a chat")
            apart = not prompt or not answer or prompt[-1].isspace() or answer[0].isspace()
            return answer if apart else f" {answer}"
        message = dict(answer) if isinstance(answer, dict) else {"role": "assistant", "content": answer}
        message["content"] = message["content"].strip()
        if not message["content"] and not any(field in message for field in WRITTEN):
            return ""
        whole = self._render([*messages, message], row, opens=False)
        if not whole.startswith(prompt):
            raise DroppedRowError(
                "answer that does not follow its prompt, as the chat template writes the prompt in another way before "
                "it (data.chat_template, data.chat_template_kwargs)"
            )
        written, after = whole[len(prompt) :], self._after_an_answer(messages, row)
        if not written.endswith(after) or _squeezed(message["content"]) not in _squeezed(written):
            raise DroppedRowError("answer of which the chat template leaves out a part")
        self._check_fields_are_written([*messages, message], len(messages), WRITTEN, row)
        return written[: len(written) - len(after)]

    def _after_an_answer(self, messages: list[Message], row: Row) -> str:
        if self._after is None:
            answered = self._render([*messages, {"role": "assistant", "content": PROBE}], row, opens=False)
            if PROBE not in answered:
                raise DroppedRowError("message of the role 'assistant', of which the chat template writes nothing")
            self._after = answered.rpartition(PROBE)[2]
        return self._after

    def _check_all_is_written(self, messages: list[Message], text: str, row: Row) -> None:
        """Raise `DroppedRowError` for a message that the chat template swallows, and for a call of a tool."""
        for place, message in enumerate(messages):
            content = message["content"].strip()
            elsewhere = any(content in other["content"] for other in messages if other is not message)
            if content and (elsewhere or content not in text):  # left out, or changed by the template
                other = [*messages[:place], {**message, "content": PROBE}, *messages[place + 1 :]]
                if self._render(other, row, opens=True) == text:
                    raise DroppedRowError(
                        f"message of the role {message['role']!r}, of which the chat template writes nothing"
                    )
            self._check_fields_are_written(messages, place, ("tool_calls",), row)

    def _check_fields_are_written(self, messages: list[Message], place: int, fields: tuple[str, ...], row: Row) -> None:
        """Raise `DroppedRowError` when the chat template writes the same without one of the fields of a message."""
        for field in (field for field in fields if field in messages[place]):
            bare = {name: value for name, value in messages[place].items() if name != field}
            without = [*messages[:place], bare, *messages[place + 1 :]]
            if self._render(messages, row, opens=False) == self._render(without, row, opens=False):
                raise DroppedRowError(f"message with {field}, which the chat template leaves out")

    def _render(self, messages: list[Message], row: Row, opens: bool) -> str:
        """The messages as text, with or without the opening of an answer, and without the tokenizer's start token."""
        template = self.chat_template
        try:
            text = render(template, messages, opens, self.tokenizer, **self.arguments)
        except Exception as error:  # whatever a template of somebody else's raises
            raise DataError(f"{row.where}: the chat template refuses the messages: {_why(error)}") from error
        return text.removeprefix(self._start)

    @cached_property
    def chat_template(self) -> str:
        """The chat template that is used. Raises `DataError` when there is none."""
        if self.own_chat_template is not None:
            return self.own_chat_template
        found = None if self.tokenizer is None else own_template(self.tokenizer)
        if found is None:
            named: Any = None if self.tokenizer is None else self.tokenizer.chat_template
            which = f"no default among its chat templates ({', '.join(sorted(named))})" if named else "no chat template"
            raise DataError(
                f"the tokenizer of {self.path or 'a model made from scratch'} has {which}: give one with "
                f"data.chat_template=FILE (templates/chatml.jinja is one)"
            )
        return found

    @cached_property
    def _start(self) -> str:
        """The start token, if the tokenizer puts it before every text."""
        tokenizer = self.tokenizer
        if tokenizer is None or tokenizer.bos_token_id is None:
            return ""
        return tokenizer.bos_token if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""


def _written(value: Any) -> Any:
    """What a template of ours writes for a value: nothing for null and NaN, which stand for what is missing."""
    return "" if value is None or value != value else value  # only NaN differs from itself


def _squeezed(text: str) -> str:
    """The text without white space, which templates change."""
    return "".join(text.split())


def _why(error: Exception) -> str:
    """What a template raised, with the kind of error where its message alone may say too little."""
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"


def _read(path: str, key: str) -> str:
    """The text of a template file, searched for in the working directory, then in this repository."""
    for file in (expanded(path, key), ROOT / path):
        if file.is_file():
            try:
                return read_bytes(file).decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                raise DataError(f"{key}={path}: it is not valid UTF-8; save it as UTF-8") from None
    raise DataError(f"{key}={path}: there is no such file")


def _compiled(path: str, key: str) -> Template:
    text = _read(path, key)
    environment: Any = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_written)
    environment.concat = joined
    try:
        made: Template = environment.from_string(text)
    except TemplateError as error:
        raise DataError(f"{key}={path}: {error}") from error
    return made
