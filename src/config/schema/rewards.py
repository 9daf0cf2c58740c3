"""The rewards."""

from __future__ import annotations

from src.config.schema.nodes import Count, Location, NonNegative, Positive, Target, Typed


class NoArguments(Typed):
    """An object without settings."""


class LearnedReward(Typed):
    """A reward model."""

    path: Location | None
    batch_size: Count


class FunctionReward(Typed):
    """A Python function."""

    target: str
    function: Target


class KeywordReward(Typed):
    """The share of some words."""

    keywords: list[str]


class LengthReward(Typed):
    """The distance to a number of words."""

    target_words: Count


class RegexReward(Typed):
    """A pattern."""

    pattern: str
    whole: bool
    match_score: float
    else_score: float


class ExactMatch(Typed):
    """The reference answer."""

    answer_column: str


class NumericMatch(Typed):
    """The last number of the reference answer."""

    answer_column: str
    marker: str
    tolerance: NonNegative


class TaskVerifier(Typed):
    """The verifier of a task of reasoning-gym."""

    pattern: str | None


class MixReward(Typed):
    """A weighted sum."""

    parts: dict[str, Target]
    weights: dict[str, float]


class HttpReward(Typed):
    """A reward that another process computes."""

    url: str
    timeout: Positive
    patience: Positive
    attempts: Count
    concurrency: Count
    batch_size: Count
    label_column: str
    token_variable: str


class AskedModel(Typed):
    """A chat model that is asked over HTTP."""

    rubric: str
    template: str | None
    pattern: str
    url: str
    model: str
    temperature: NonNegative
    max_tokens: Count
    cache: str | None
    timeout: Positive
    patience: Positive
    attempts: Count
    concurrency: Count
    token_variable: str


class MarkingModel(AskedModel):
    """One that gives marks."""

    lowest: float
    highest: float


class StepReward(Typed):
    """A score per step."""

    separator: str
    mean: bool
    step: Target
