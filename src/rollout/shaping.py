"""What happens to a score before it becomes a reward: clip, then the missing-EOS rule, then (elsewhere) the KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from src.core.checks import require
from src.core.rewards import set_missing_eos, subtract_missing_eos


class MissingEos(Protocol):
    """What an unfinished response costs."""

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Return the scores, (B,), changed where `finished` (B,) is False."""
        ...


@dataclass(frozen=True)
class IgnoreMissingEos:
    """An unfinished response costs nothing."""

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Return the scores as they are."""
        return scores


@dataclass(frozen=True)
class SetMissingEos:
    """An unfinished response scores `missing_eos_score`, whatever it says."""

    missing_eos_score: float

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Return the scores, replaced where unfinished."""
        return set_missing_eos(scores, finished, self.missing_eos_score)


@dataclass(frozen=True)
class SubtractMissingEos:
    """An unfinished response scores `missing_eos_penalty` less than what it says."""

    missing_eos_penalty: float

    def __post_init__(self) -> None:
        """Refuse a bonus."""
        require(self.missing_eos_penalty >= 0, "missing_eos_penalty", self.missing_eos_penalty, "at least 0")

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Return the scores, lowered where unfinished."""
        return subtract_missing_eos(scores, finished, self.missing_eos_penalty)


@dataclass(frozen=True)
class ScoreShaping:
    """Clip to +-`score_clip` (None: leave), then apply the missing-EOS rule; the KL term is never clipped with it."""

    score_clip: float | None
    missing_eos: MissingEos

    def __post_init__(self) -> None:
        """Refuse an empty range."""
        require(
            self.score_clip is None or self.score_clip > 0, "score_clip", self.score_clip, "greater than 0, or null"
        )

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Shapes: scores, finished (B,) -> (B,)."""
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return self.missing_eos(scores, finished)
