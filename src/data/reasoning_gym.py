"""Tasks of the package reasoning-gym, each with questions without end and a verifier of its own."""

from __future__ import annotations

from typing import Any

from src.data.prompts import PromptWriter
from src.data.sources import Row
from src.data.tables import SPLITS, check_split
from src.errors import DataError, require
from src.types import PromptRow
from src.utils.gym import entries_of


class ReasoningGym:
    """`questions` distinct questions of a task, of which the share `held_out` is each of validation and test.

    A question is a user's message if `chat` is set, and the task's own answer, written in `answer_format`, is what SFT
    imitates. Prompts carry the columns `answer`, `entry`, `task` and `params`, by which the reward of the same name
    finds the verifier.
    """

    def __init__(
        self,
        task: str,
        params: dict[str, Any] | None = None,
        questions: int = 2_000,
        held_out: float = 0.1,
        answer_format: str = "{answer}",
        chat: bool = True,
        system: str | None = None,
        chat_template: str | None = None,
        tokenizer: str | None = None,
        trusted: bool = False,
        seed: int = 1,
    ) -> None:
        """Make the questions.

        Raises:
            DataError: The package or the task is not there, `params` do not suit it, or it has too few questions.
        """
        require(questions >= 10, "questions", questions, "at least 10")
        require(0 < held_out < 0.5, "held_out", held_out, "above 0 and below 0.5")
        require("{answer}" in answer_format, "answer_format", answer_format, "a text with {answer} in it")
        self.task, self.params, self.answer_format = task, params, answer_format
        self.writer = PromptWriter(None, chat, system, chat_template, tokenizer, trusted=trusted)
        entries = distinct(entries_of(task, params, questions, seed))
        cut = max(1, round(len(entries) * held_out))
        if len(entries) < 3 * cut or len(entries) < 10:
            raise DataError(f"data.task={task}: only {len(entries)} distinct questions with data.params={params}")
        self._entries = dict(zip(SPLITS, (entries[2 * cut :], entries[:cut], entries[cut : 2 * cut]), strict=True))

    def texts(self, split: str) -> list[str]:
        """Each question with its answer."""
        check_split(split)
        return [self._text(row) for row in self._rows(split)]

    def prompts(self, split: str) -> list[PromptRow]:
        """The questions."""
        check_split(split)
        return [
            PromptRow(self.writer.write(row.columns["entry"]["question"], row)[0], row.columns)
            for row in self._rows(split)
        ]

    def quality(self, texts: list[str]) -> dict[str, list[float]]:
        """No measure: the verifier says it all."""
        return {}

    def _text(self, row: Row) -> str:
        prompt, messages = self.writer.write(row.columns["entry"]["question"], row)
        answer = self.answer_format.replace("{answer}", str(row.columns["answer"]))
        return prompt + self.writer.follow(prompt, answer, messages, row)

    def _rows(self, split: str) -> list[Row]:
        """The entries with what a prompt carries."""
        own = {"task": self.task, "params": self.params}
        return [
            Row(f"reasoning-gym {self.task}, question {number}", {"answer": entry["answer"], "entry": entry, **own})
            for number, entry in enumerate(self._entries[split], start=1)
        ]


def distinct(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries by question, the first of each; the last question comes first."""
    return list({entry["question"]: entry for entry in reversed(entries)}.values())
