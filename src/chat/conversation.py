"""What was said so far, as the token ids a model goes on from."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@dataclass
class Conversation:
    """Messages in the model's own chat template; a model without one continues each line by itself.

    `room`: the most tokens of a prompt, None where the model sets no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    room: int | None
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        """Whether the model knows turns at all."""
        return bool(self.tokenizer.chat_template)

    def ask(self, text: str) -> tuple[list[int], str | None]:
        """Take up what the user says: the ids to go on from, and a note where something had to be left out.

        The oldest turns go first; then the beginning of the text itself.
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
            note = f"the oldest {asked - len(self.messages)} messages no longer fit and are left out"
        if self._too_long(ids):
            note = f"only the last {self.room} of {len(ids)} tokens fit into the model's context"
            ids = ids[-self.room :] if self.room is not None else ids
        return ids, note

    def answered(self, text: str) -> None:
        """Keep what the model said."""
        if self.has_template:
            self.messages.append({"role": "assistant", "content": text})

    def clear(self) -> None:
        """Forget all turns."""
        self.messages = []

    def ids(self) -> list[int]:
        """Token ids of the messages, up to where the model speaks."""
        if not self.has_template:
            return list(self.tokenizer(self.messages[-1]["content"])["input_ids"])
        first = [{"role": "system", "content": self.system}] if self.system else []
        text = self.tokenizer.apply_chat_template([*first, *self.messages], add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _too_long(self, ids: list[int]) -> bool:
        return self.room is not None and len(ids) > self.room


def valid(text: str) -> str:
    """The text with `?` for what is no Unicode character (halves of surrogate pairs, bytes that were not UTF-8)."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
