"""A corpus from a table of rows, on the hub or in files: texts, prompts and preference pairs, filtered and counted."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from src.data.prompts import PromptWriter
from src.data.row_formats import DroppedRowError, Example, RowFormat, has_words
from src.data.sources import Row, Source
from src.data.tables import SPLITS, check_split
from src.errors import DataError, require
from src.models.text import encode_prompts
from src.types import PreferencePair, PromptRow

ORDER = ("test", "validation", "train")  # a row in two splits is dropped from the later one


@dataclass(frozen=True)
class Sample:
    """A row that was read: prompt and answers as the models read them."""

    where: str
    prompt: str
    answers: dict[str, str]  # response, chosen, rejected: those that the set has
    gap: float | None
    metadata: dict[str, Any]


class Filters:
    """Counts the dropped rows by split and reason, with the place of the first."""

    def __init__(self) -> None:
        self.dropped: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in SPLITS}

    def drop(self, split: str, reason: str, where: str) -> None:
        """Count a dropped row."""
        self.dropped[split][reason].append(where)

    def counts(self, split: str) -> dict[str, int]:
        """Dropped rows, by reason."""
        return {reason: len(rows) for reason, rows in self.dropped[split].items()}

    def sentence(self, split: str, kept: int) -> str:
        """How many rows are kept, and why the others are dropped."""
        total = kept + sum(self.counts(split).values())
        dropped = [f"{len(rows)} {reason} (first: {rows[0]})" for reason, rows in self.dropped[split].items()]
        return f"{kept} of {total} rows" + (f"; dropped: {', '.join(dropped)}" if dropped else "")


class TableCorpus:
    """Rows of a set, read by a row format, written as text, filtered, and split so that no prompt is in two splits.

    A split that the set does not have is cut from its train split: the share `held_out` of its prompts, chosen by a
    hash of seed and prompt, so that other filters or further rows hardly change it.
    """

    def __init__(
        self,
        path: str,
        columns: RowFormat,
        splits: dict[str, str | None],
        name: str | None = None,
        revision: str | None = None,
        folder: str | None = None,
        template: str | None = None,
        chat: bool = False,
        system: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        trusted: bool = False,
        max_prompt_tokens: int | None = None,
        max_response_tokens: int | None = None,
        held_out: float = 0.1,
        seed: int = 1,
        pairs: Callable[..., TableCorpus] | None = None,
    ) -> None:
        """Read everything. conf/data/base.yaml explains the arguments; `pairs` makes a separate set of pairs.

        `trusted`: code in the tokenizer's folder may be run.

        Raises:
            DataError: The set cannot be read, a column is wrong, or no row is left of a split.
        """
        require(0 < held_out < 0.5, "held_out", held_out, "above 0 and below 0.5")
        for limit, value in (("max_prompt_tokens", max_prompt_tokens), ("max_response_tokens", max_response_tokens)):
            require(value is None or value >= 1, limit, value, "at least 1, or null")
        self.path, self.columns, self.held_out, self.seed = path, columns, held_out, seed
        self.limits = {"prompt": max_prompt_tokens, "answer": max_response_tokens}
        own = {"tokenizer": tokenizer, "trusted": trusted, "held_out": held_out, "seed": seed}
        written = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs}
        limits = {"max_prompt_tokens": max_prompt_tokens, "max_response_tokens": max_response_tokens}
        self._pair_corpus = None if pairs is None else pairs(**own, **written, **limits)
        self.writer = PromptWriter(template, chat, system, chat_template, tokenizer, chat_template_kwargs, trusted)
        self.filters = Filters()
        rows = Source(path, name, revision, folder, splits).read()
        read = {split: list(self._read(split, part)) for split, part in rows.items()}
        self._rows = self._with_all_splits(self._kept(read))
        for split, kept in self._rows.items():
            if not kept:
                raise DataError(self._why_empty(split, [split for split in SPLITS if split not in rows]))

    @property
    def account(self) -> dict[str, Any]:
        """By split: rows read (or cut from train), rows kept, and rows dropped by reason; whether prompts are chats."""
        own: dict[str, Any] = {"chats": self.chats}
        for split, kept in self._rows.items():
            dropped = self.filters.counts(split)
            own[split] = {"rows": len(kept) + sum(dropped.values()), "kept": len(kept), "dropped": dropped}
        return own if self._pair_corpus is None else {**own, "pairs": self._pair_corpus.account}

    @property
    def chats(self) -> bool:
        """Whether every prompt went through a chat template."""
        return all("prompt_messages" in sample.metadata for kept in self._rows.values() for sample in kept)

    @property
    def chat_template(self) -> str | None:
        """The chat template that wrote prompts here; None where none did."""
        any_chat = any("prompt_messages" in sample.metadata for kept in self._rows.values() for sample in kept)
        return self.writer.chat_template if any_chat else None

    def report(self) -> str:
        """The account in words, one line per split."""
        lines = [
            f"{self.path}, {split}: {self.filters.sentence(split, len(kept))}" for split, kept in self._rows.items()
        ]
        return "\n".join([*lines, *([self._pair_corpus.report()] if self._pair_corpus is not None else [])])

    def texts(self, split: str) -> list[str]:
        """Prompt and answer of each row; the chosen answer if the set has no other."""
        check_split(split)
        return [sample.prompt + self._answer(sample, "response", "chosen") for sample in self._rows[split]]

    def prompts(self, split: str) -> list[PromptRow]:
        """The prompts, with all columns of their rows, and `prompt_messages` if they are chats."""
        check_split(split)
        return [PromptRow(sample.prompt, sample.metadata) for sample in self._rows[split]]

    def pairs(self, split: str) -> list[PreferencePair]:
        """The preference pairs; from a separate set of pairs, none whose prompt is held out here."""
        check_split(split)
        if self._pair_corpus is not None:
            held_out = {sample.prompt for own in SPLITS if own != split for sample in self._rows[own]}
            pairs = self._pair_corpus.pairs(split)
            return [pair for pair in pairs if split != "train" or pair.prompt not in held_out]
        return [
            PreferencePair(
                prompt=s.prompt, chosen=self._answer(s, "chosen"), rejected=self._answer(s, "rejected"), gap=s.gap
            )
            for s in self._rows[split]
        ]

    def quality(self, texts: list[str]) -> dict[str, list[float]]:
        """No measure: the form of these texts has no exact one."""
        return {}

    def _why_empty(self, split: str, made: list[str]) -> str:
        """Why no row is left of a split; `made` are the splits that are cut from the train split."""
        prompts = {sample.prompt for own in made for sample in self._rows[own]}
        if split == "train" and prompts:
            splits = " and ".join(f"data.splits.{own}" for own in made)
            return (
                f"{self.path} has too few prompts ({len(prompts)}): data.held_out={self.held_out:g} holds out at least "
                f"one for each of {' and '.join(made)}, which leaves none to train on; give more rows, or files in "
                f"{splits}"
            )
        return f"{self.path} leaves the {split} split empty: {self.filters.sentence(split, 0)}"

    def _answer(self, sample: Sample, *names: str) -> str:
        for name in names:
            if name in sample.answers:
                return sample.answers[name]
        raise DataError(f"{self.path} has no {names[0]} answers here: name their column with data.columns.{names[0]}")

    def _read(self, split: str, rows: list[Row]) -> Iterator[Sample]:
        for row in rows:
            try:
                sample = self._sample(row, self.columns.read(row))
            except DroppedRowError as dropped:
                sample = str(dropped)
            if isinstance(sample, Sample):
                yield sample
            else:
                self.filters.drop(split, sample, row.where)

    def _sample(self, row: Row, example: Example | str) -> Sample | str:
        """The sample of an example, or why there is none."""
        if isinstance(example, str):
            return example
        if example.prompt is not None and not has_words(example.prompt):
            return "no prompt"
        prompt, messages = self.writer.write(example.prompt, row)
        given = {"response": example.response, "chosen": example.chosen, "rejected": example.rejected}
        answers = {k: self.writer.follow(prompt, v, messages, row) for k, v in given.items() if v is not None}
        metadata = row.columns if messages is None else {**row.columns, "prompt_messages": messages}
        return Sample(row.where, prompt, answers, example.gap, metadata)

    def _with_all_splits(self, kept: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
        """All splits; a missing one gets its share of the prompts that the filters leave of the train split."""
        missing, train = [split for split in ORDER if split not in kept], kept["train"]
        prompts = sorted({sample.prompt for sample in train}, key=self._place)
        share = max(1, round(self.held_out * len(prompts)))
        places = {prompt: number // share for number, prompt in enumerate(prompts[: share * len(missing)])}
        cut = {split: [s for s in train if places.get(s.prompt) == number] for number, split in enumerate(missing)}
        kept = kept | cut | {"train": [sample for sample in train if sample.prompt not in places]}
        return {split: kept[split] for split in SPLITS}

    def _place(self, prompt: str) -> bytes:
        return hashlib.sha256(f"{self.seed}/{prompt}".encode()).digest()

    def _kept(self, read: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
        """The rows that pass every filter."""
        kept: dict[str, list[Sample]] = {}
        elsewhere: set[str] = set()
        for split in (split for split in ORDER if split in read):
            samples = read[split]
            long = self._too_long(samples)
            seen: set[tuple[str, ...]] = set()
            kept[split] = []
            for sample, reason in zip(samples, long, strict=True):
                content = (sample.prompt, *sample.answers.values())
                if sample.prompt in elsewhere:
                    reason = "in another split"
                elif content in seen:
                    reason = "repeated"
                reason = _unusable(sample) or reason
                seen.add(content)
                if reason:
                    self.filters.drop(split, reason, sample.where)
                else:
                    kept[split].append(sample)
            elsewhere |= {sample.prompt for sample in kept[split]}
        return kept

    def _too_long(self, samples: list[Sample]) -> list[str]:
        """For each row which part has too many tokens, or ""."""
        reasons = [""] * len(samples)
        for part, limit in self.limits.items():
            if limit is None or not samples:
                continue
            tokenizer = self.writer.tokenizer
            if tokenizer is None:
                key = f"data.max_{'prompt' if part == 'prompt' else 'response'}_tokens"
                raise DataError(
                    f"{key}={limit}: a model made from scratch has no tokenizer yet to count with: {key}=null"
                )
            texts = [[s.prompt] if part == "prompt" else list(s.answers.values()) for s in samples]
            flat = [text for row in texts for text in row]
            ids = iter(encode_prompts(tokenizer, flat, special=part == "prompt"))
            end = part == "answer"  # the end token counts
            for number, row in enumerate(texts):
                if any([len(next(ids)) + end > limit for _ in row]):
                    reasons[number] = f"{part} longer than {limit} tokens"
        return reasons


def _unusable(sample: Sample) -> str:
    if not sample.prompt.strip():
        return "no prompt"
    if any(not answer.strip() for answer in sample.answers.values()):
        return "an empty answer"
    if "chosen" in sample.answers and sample.answers["chosen"] == sample.answers["rejected"]:
        return "identical sides"
    return ""
