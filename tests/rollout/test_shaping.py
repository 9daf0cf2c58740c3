"""Shaping of scores: scale, clip, then the missing-EOS rule."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from src.errors import SettingError
from src.rollout.shaping import (
    IgnoreMissingEos,
    MissingEos,
    Normalize,
    NoScaling,
    ScaleByStd,
    ScoreShaping,
    SetMissingEos,
    SubtractMissingEos,
)

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
    assert ScoreShaping(NoScaling(), clip, rule)(scores, FINISHED).tolist() == expected
    assert torch.equal(scores, SCORES)


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_an_empty_range_is_refused(clip: float) -> None:
    """Checklist 20."""
    with pytest.raises(SettingError, match="score_clip"):
        ScoreShaping(NoScaling(), clip, IgnoreMissingEos())


def test_a_bonus_for_not_ending_is_refused() -> None:
    """Checklist 19."""
    with pytest.raises(SettingError, match="missing_eos_penalty"):
        SubtractMissingEos(-0.1)


STREAM = (3.0 + 2.0 * torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).split([4, 1, 5])


@pytest.mark.parametrize("after", [1, 2, 3])
def test_scaling_divides_by_the_spread_of_all_scores_so_far(after: int) -> None:
    """Checklist 21 and 22. The std by torch over the concatenation; the mean stays, unless normalizing is asked for."""
    seen, batch = torch.cat(STREAM[:after]), STREAM[after - 1]
    scaled, normalized = ScaleByStd(), Normalize()
    for scores in STREAM[:after]:
        scaled.update(scores)
        normalized.update(scores)
    assert_close(scaled(batch), batch / seen.std(unbiased=True))
    assert_close(normalized(batch), (batch - seen.mean()) / seen.std(unbiased=True))
    assert_close(scaled(seen).mean(), seen.mean() / seen.std(unbiased=True))
    assert_close(normalized(seen).mean(), torch.tensor(0.0, dtype=torch.float64))
    assert_close(normalized(seen).std(unbiased=True), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("scaling", [NoScaling(), ScaleByStd(), Normalize()])
def test_scaling_starts_at_one_and_looking_is_not_taking_in(scaling: NoScaling) -> None:
    """Checklist 21. Before anything was seen scores are as they are, and asking twice gives the same twice."""
    before = scaling.state_dict()
    assert_close(scaling(SCORES), SCORES)
    assert_close(scaling(SCORES), SCORES)
    assert scaling.state_dict() == before


def test_no_scaling_takes_nothing_in() -> None:
    """Checklist 22 and 61."""
    scaling = NoScaling()
    scaling.update(SCORES)
    scaling.load_state_dict(scaling.state_dict())
    assert scaling.state_dict() == {}
    assert scaling(SCORES).tolist() == SCORES.tolist()


def test_a_single_score_or_equal_ones_stay_finite() -> None:
    """Checklist 41. One score has no spread: unit 1. Equal ones are at their mean, 0.1 too."""
    score = torch.tensor([2.0])
    for scaling, expected in ((ScaleByStd(), 2.0), (Normalize(), 0.0)):
        scaling.update(score)
        assert_close(scaling(score), torch.tensor([expected]))
    equal, scores = Normalize(), torch.full((3,), 0.1)
    equal.update(scores)
    assert_close(equal(scores), torch.zeros(3))


@pytest.mark.parametrize("scaling", [ScaleByStd, Normalize])
def test_the_moments_survive_a_checkpoint(scaling: type[ScaleByStd]) -> None:
    """Checklist 61. Another one, told the state, goes on as the first does."""
    one, two = scaling(), scaling()
    for scores in STREAM[:2]:
        one.update(scores)
    two.load_state_dict(one.state_dict())
    for shaper in (one, two):
        shaper.update(STREAM[2])
    assert_close(two(SCORES), one(SCORES))
    assert two.state_dict() == one.state_dict()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (IgnoreMissingEos(), [1.5, -1.5, 0.25, 1.5]),
        (SetMissingEos(-3.0), [1.5, -3.0, -3.0, -3.0]),
        (SubtractMissingEos(3.0), [1.5, -4.5, -2.75, -1.5]),
    ],
)
def test_scaled_then_clipped_then_the_rule(rule: MissingEos, expected: list[float]) -> None:
    """Checklist 20. With a std of 2: 5 -> 2.5 -> 1.5; clipped first it would be 0.75. The rule has its own unit."""
    scaling = ScaleByStd()
    scaling.update(torch.tensor([-2.0, 0.0, 2.0]))
    assert_close(ScoreShaping(scaling, 1.5, rule)(SCORES, FINISHED), torch.tensor(expected))


def test_normalized_then_clipped() -> None:
    """Checklist 20. The clip is around the mean of the stream: (5 - 1) / 2 -> 1.5, (0.5 - 1) / 2 stays."""
    scaling = Normalize()
    scaling.update(torch.tensor([-1.0, 1.0, 3.0]))
    shaped = ScoreShaping(scaling, 1.5, IgnoreMissingEos())(SCORES, FINISHED)
    assert_close(shaped, torch.tensor([1.5, -1.5, -0.25, 1.5]))


def test_shaping_takes_nothing_in_by_itself() -> None:
    """Checklist 21. Whoever owns the stream says what belongs to it: held-out or greedy responses do not."""
    scaling = ScaleByStd()
    ScoreShaping(scaling, None, IgnoreMissingEos())(SCORES, FINISHED)
    assert scaling.moments.count == 0


@pytest.mark.parametrize(("scaling", "expected"), [(ScaleByStd, 1.0), (Normalize, 0.0)])
def test_equal_scores_are_not_blown_up(scaling: type[ScaleByStd], expected: float) -> None:
    """A verifier that says 1 to every response: there is no spread to divide by."""
    scale = scaling()
    scale.update(torch.ones(4))
    assert scale(torch.ones(4)).tolist() == [expected] * 4
