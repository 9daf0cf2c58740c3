"""The text of a prompt: a column, a template over the row's columns, or messages through a chat template."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from src.data.row_formats import Message, Prompt
from src.data.sources import Row
from src.errors import DataError
from src.models.loading import load_tokenizer

ROOT = Path(__file__).parents[2]
PROBE = "(answer)"  # stands for an answer, to find out what a chat template writes before one


class PromptWriter:
    """Writes prompts as text.

    A template file makes plain text from the row's columns. Messages, and with `chat` a plain text as a user's message,
    go through the chat template of the tokenizer or of the file `chat_template`, up to where the answer begins.
    `trusted`: code in the tokenizer's folder may be run.
    """

    def __init__(
        self, template: str | None, chat: bool, system: str | None, chat_template: str | None, tokenizer: str | None,
        trusted: bool = False,
    ) -> None:  # fmt: skip
        self.chat, self.system, self.path, self.trusted = chat, system, tokenizer, trusted
        self._between: str | None = None  # filled in with the first chat
        self.template = None if template is None else _compiled(template, "data.template")
        self.own_chat_template = None if chat_template is None else _read(chat_template, "data.chat_template")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The policy's tokenizer; None for a model made from scratch, which has none yet."""
        return None if self.path is None else load_tokenizer(self.path, trusted=self.trusted)

    def write(self, prompt: Prompt | None, row: Row) -> tuple[str, list[Message] | None]:
        """The prompt's text, and its messages if it is a chat. Raises `DataError` that names the row."""
        if self.template is not None:
            prompt = self._fill(row)
        if prompt is None:
            raise DataError("the data has no prompts: name their column (data.columns.prompt) or give data.template")
        if isinstance(prompt, str) and not self.chat:
            if self.system is not None:
                raise DataError(f"data.system={self.system!r}: plain text has no system message; add data.chat=true")
            return prompt, None
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system is not None and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return self._render(messages, row, answer=True), messages

    def _fill(self, row: Row) -> str:
        assert self.template is not None
        try:
            return self.template.render(**row.columns)
        except TemplateError as error:
            raise DataError(
                f"{row.where}: data.template cannot be filled: {error}; the columns are {sorted(row.columns)}"
            ) from error

    def follow(self, prompt: str, response: str, messages: list[Message] | None, row: Row) -> str:
        """The response as it follows the prompt.

        In a chat it is stripped and comes after what the chat template writes between the two; otherwise one space is
        put before it, as a word with its space is one token of most tokenizers.
        """
        if messages is None:
            apart = not prompt or not response or prompt[-1].isspace() or response[0].isspace()
            return response if apart else f" {response}"
        if self._between is None:
            answered = self._render([*messages, {"role": "assistant", "content": PROBE}], row, answer=False)
            self._between = answered.removeprefix(prompt).partition(PROBE)[0] if answered.startswith(prompt) else ""
        return self._between + response.strip() if response.strip() else ""

    def _render(self, messages: list[Message], row: Row, answer: bool) -> str:
        """The messages as text, with or without the opening of an answer, and without the tokenizer's start token."""
        special: dict[str, Any] = {} if self.tokenizer is None else self.tokenizer.special_tokens_map
        try:
            text = render_jinja_template(
                [messages], chat_template=self._chat_template, add_generation_prompt=answer, **special
            )[0][0]
        except (TemplateError, TypeError) as error:
            raise DataError(f"{row.where}: the chat template refuses the messages: {error}") from error
        return text.removeprefix(self._start)

    @cached_property
    def _chat_template(self) -> str:
        if self.own_chat_template is not None:
            return self.own_chat_template
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise DataError(
                f"the tokenizer of {self.path or 'a model made from scratch'} has no chat template: give one with "
                f"data.chat_template=FILE (templates/chatml.jinja is one)"
            )
        return str(self.tokenizer.get_chat_template())

    @cached_property
    def _start(self) -> str:
        """The start token, if the tokenizer puts it before every text."""
        tokenizer = self.tokenizer
        if tokenizer is None or tokenizer.bos_token_id is None:
            return ""
        return tokenizer.bos_token if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""


def _read(path: str, key: str) -> str:
    """The text of a template file, searched for in the working directory, then in this repository."""
    for file in (Path(path).expanduser(), ROOT / path):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise DataError(f"{key}={path}: there is no such file")


def _compiled(path: str, key: str) -> Template:
    text = _read(path, key)
    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(text)
    except TemplateError as error:
        raise DataError(f"{key}={path}: {error}") from error
