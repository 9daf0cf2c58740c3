"""Shaping of scores: scale, clip, missing-EOS rule; the KL is subtracted later, in `src.core.rewards`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from src.core.moments import Moments, combined, of_batch
from src.core.rewards import set_missing_eos, subtract_missing_eos
from src.errors import require


class MissingEos(Protocol):
    """The rule for the score of an unfinished response."""

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Return the scores, (B,), changed where `finished` (B,) is False."""
        ...


@dataclass(frozen=True)
class IgnoreMissingEos:
    """An unfinished response keeps its score."""

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Return the scores unchanged."""
        return scores


@dataclass(frozen=True)
class SetMissingEos:
    """An unfinished response scores `missing_eos_score`."""

    missing_eos_score: float

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Return the scores, replaced where unfinished."""
        return set_missing_eos(scores, finished, self.missing_eos_score)


@dataclass(frozen=True)
class SubtractMissingEos:
    """An unfinished response scores `missing_eos_penalty` less."""

    missing_eos_penalty: float

    def __post_init__(self) -> None:
        """Refuse a bonus."""
        require(self.missing_eos_penalty >= 0, "missing_eos_penalty", self.missing_eos_penalty, "at least 0")

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Return the scores, lowered where unfinished."""
        return subtract_missing_eos(scores, finished, self.missing_eos_penalty)


class NoScaling:
    """Scores are not scaled."""

    unit = 1.0  # what a score is divided by

    def update(self, scores: Tensor) -> None:
        """Nothing to update."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the scores, (B,)."""
        return scores

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """No state to restore."""


class ScaleByStd(NoScaling):
    """score / std of all scores so far, the present batch included; the mean is not subtracted.

    Source: "Secrets of RLHF", section 5.3.1 (https://arxiv.org/abs/2307.04964).
    """

    def __init__(self) -> None:
        self.moments = Moments()

    @property
    def unit(self) -> float:  # type: ignore[override]
        """The running standard deviation; 1 while all scores are equal."""
        return self.moments.std or 1.0

    def update(self, scores: Tensor) -> None:
        """Update the running moments with a batch."""
        self.moments = combined(self.moments, of_batch(scores))

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the scores, (B,), divided by the running standard deviation."""
        return scores / self.unit

    def state_dict(self) -> dict[str, Any]:
        """The running moments."""
        return asdict(self.moments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the running moments."""
        self.moments = Moments(**state)


class Normalize(ScaleByStd):
    """(score - mean) / std of all scores so far, the present batch included (same source)."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the scores, (B,), with the running mean at 0 and the running standard deviation at 1."""
        return (scores - self.moments.mean) / self.unit


@dataclass(frozen=True)
class ScoreShaping:
    """Scale, clip to +-`score_clip` (None: no clip), apply the missing-EOS rule; the KL term is not clipped."""

    scaling: NoScaling
    score_clip: float | None
    missing_eos: MissingEos

    def __post_init__(self) -> None:
        """Refuse an empty range."""
        require(
            self.score_clip is None or self.score_clip > 0, "score_clip", self.score_clip, "greater than 0, or null"
        )

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Shapes: scores, finished (B,) -> (B,)."""
        return self.missing_eos(self._clipped(self.scaling(scores)), finished)

    def of_credit(self, scores: Tensor, credit: Tensor) -> Tensor:
        """Each token's part of a score, multiplied by what scale and clip multiply the score by.

        The shift of `Normalize` and the missing-EOS rule are no factors: what they change is left to the last token.
        Shapes: scores (B,), credit (B, T) -> (B, T).
        """
        scaled = self.scaling(scores)
        share = torch.ones_like(scaled)
        if self.score_clip is not None:
            share = (self.score_clip / scaled.abs()).clamp(max=1)  # 1 within the range, and at 0
        return credit / self.scaling.unit * share.unsqueeze(1)

    def _clipped(self, scores: Tensor) -> Tensor:
        return scores if self.score_clip is None else scores.clamp(-self.score_clip, self.score_clip)
