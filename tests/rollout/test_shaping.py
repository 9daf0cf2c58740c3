"""Shaping of scores: clip, then the missing-EOS rule."""

from __future__ import annotations

import pytest
import torch

from src.core.checks import SettingError
from src.rollout.shaping import IgnoreMissingEos, MissingEos, ScoreShaping, SetMissingEos, SubtractMissingEos

SCORES = torch.tensor([5.0, -5.0, 0.5, 5.0])
FINISHED = torch.tensor([True, False, False, False])


@pytest.mark.parametrize(
    ("clip", "rule", "expected"),
    [
        (None, IgnoreMissingEos(), [5.0, -5.0, 0.5, 5.0]),
        (None, SetMissingEos(-3.0), [5.0, -3.0, -3.0, -3.0]),
        (None, SubtractMissingEos(3.0), [5.0, -8.0, -2.5, 2.0]),
        (1.0, IgnoreMissingEos(), [1.0, -1.0, 0.5, 1.0]),
        (1.0, SetMissingEos(-3.0), [1.0, -3.0, -3.0, -3.0]),  # the rule's own number is not clipped
        (1.0, SubtractMissingEos(3.0), [1.0, -4.0, -2.5, -2.0]),
    ],
)
def test_the_clip_comes_before_the_missing_eos_rule(
    clip: float | None, rule: MissingEos, expected: list[float]
) -> None:
    """Checklist 19, 20."""
    scores = SCORES.clone()
    assert ScoreShaping(clip, rule)(scores, FINISHED).tolist() == expected
    assert torch.equal(scores, SCORES)


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_an_empty_range_is_refused(clip: float) -> None:
    """Checklist 20."""
    with pytest.raises(SettingError, match="score_clip"):
        ScoreShaping(clip, IgnoreMissingEos())


def test_a_bonus_for_not_ending_is_refused() -> None:
    """Checklist 19."""
    with pytest.raises(SettingError, match="missing_eos_penalty"):
        SubtractMissingEos(-0.1)
