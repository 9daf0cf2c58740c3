"""The conversation so far, as the token ids that the model continues."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from src.models.chat_template import own_template, render
from src.models.text import encode_prompts

Message = dict[str, str]


@dataclass
class Conversation:
    """Messages in the model's chat template; a model without one continues each line alone.

    `room`: the longest prompt in tokens; None where the model sets no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    room: int | None
    system: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # further variables of the chat template
    messages: list[Message] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return own_template(self.tokenizer) is not None

    def ask(self, text: str) -> tuple[list[int], str | None]:
        """Add the user's message; returns the prompt's ids, and a note when something did not fit.

        The oldest turns are dropped first, then the beginning of the text.
        """
        self.messages = (
            [*self.messages, {"role": "user", "content": text}] if self.has_template else [{"content": text}]
        )
        asked, note = len(self.messages), None
        ids = self.ids()
        while self._too_long(ids) and len(self.messages) > 1:
            self.messages = self.messages[2:]
            ids = self.ids()
        if len(self.messages) < asked:
            note = f"the oldest {asked - len(self.messages)} messages do not fit and are dropped"
        if self._too_long(ids):
            note = f"only the last {self.room} of {len(ids)} tokens fit into the model's context"
            ids = ids[-self.room :] if self.room is not None else ids
        return ids, note

    def answered(self, text: str) -> None:
        """Add the model's answer."""
        if self.has_template:
            self.messages.append({"role": "assistant", "content": text})

    def clear(self) -> None:
        """Forget all turns."""
        self.messages = []

    def ids(self) -> list[int]:
        """Token ids of the messages, up to where the answer begins."""
        template = own_template(self.tokenizer)
        if template is None:
            return encode_prompts(self.tokenizer, [self.messages[-1]["content"]])[0]
        first = [{"role": "system", "content": self.system}] if self.system else []
        text = render(template, [*first, *self.messages], True, self.tokenizer, **self.arguments)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _too_long(self, ids: list[int]) -> bool:
        return self.room is not None and len(ids) > self.room


def valid(text: str) -> str:
    """The text with `?` for everything that is not a Unicode character (lone surrogates, bytes that were not UTF-8)."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
