"""The data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from src.config.schema.nodes import LARGEST, Count, Node, Positive, Target, Typed, Unit, Whole


class Reviews(Typed):
    """The embedded film reviews."""

    gold: Target | None
    n_reviews: Annotated[int, Field(ge=12, le=LARGEST)]
    n_pairs: Count
    flip: Annotated[float, Field(ge=0, le=0.5)]
    prompt_words: Annotated[int, Field(ge=2, le=4)]
    seed: Whole


class Arithmetic(Typed):
    """The embedded sums."""

    largest: Annotated[int, Field(ge=9, le=LARGEST)]
    noise: Unit
    copies: Count
    seed: Whole


class RatedSentences(Typed):
    """A file of rated sentences."""

    path: str
    text_column: str
    rating_column: str
    min_gap: Positive
    n_pairs: Count
    prompt_words: Count
    max_words: Count
    seed: Whole


class ReasoningGym(Typed):
    """A task of the package reasoning-gym."""

    task: str
    params: dict[str, Any] | None
    questions: Annotated[int, Field(ge=10, le=LARGEST)]
    held_out: Annotated[float, Field(gt=0, lt=0.5)]
    answer_format: str
    chat: bool
    system: str | None
    chat_template: str | None
    tokenizer: str | None
    seed: Whole


class Columns(Typed):
    """A column for each part of a row."""

    prompt: str | None = None
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    chosen_score: str | None = None
    rejected_score: str | None = None


class Dialogues(Typed):
    """Two dialogues that differ in the last answer."""

    chosen: str
    rejected: str


class PrefixPrompt(Typed):
    """Texts whose first words are the prompt."""

    text: str
    words: Count


class Comparisons(Typed):
    """Two answers and which of them is better."""

    answers: str
    text: str
    choice: str
    required: str | None = None


def class_name(node: Any) -> str:
    """The class that a `_target_` node names."""
    target = node.get("_target_", "") if isinstance(node, Mapping) else getattr(node, "path_of_target", "")
    return str(target).rpartition(".")[2]


PairColumns = Annotated[
    Annotated[Columns, Tag("Columns")]
    | Annotated[Comparisons, Tag("Comparisons")]
    | Annotated[Dialogues, Tag("Dialogues")],
    Discriminator(class_name),
]


class Splits(Node):
    """What a set calls its splits."""

    train: str
    validation: str | None
    test: str | None


class Pairs(Typed):
    """A set of preference pairs, apart from the set with the texts."""

    path: str
    name: str | None = None
    revision: str | None = None
    folder: str | None = None
    splits: Splits
    template: str | None = None
    columns: PairColumns


class Table(Typed):
    """A set on the hub or in files."""

    path: str
    name: str | None
    revision: str | None
    folder: str | None
    splits: Splits
    held_out: Annotated[float, Field(gt=0, lt=0.5)]
    template: str | None
    chat: bool
    system: str | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    tokenizer: str | None
    max_prompt_tokens: Count | None
    max_response_tokens: Count | None
    seed: Whole
    pairs: Pairs | None


class ColumnTable(Table):
    """A set with a column for each part."""

    columns: Columns


class DialogueTable(Table):
    """A set of dialogues."""

    columns: Dialogues


class TextTable(Table):
    """A set of texts without prompts."""

    columns: PrefixPrompt
