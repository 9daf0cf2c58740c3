"""Metrics of a batch: what a reward calls its parts never covers a metric."""

from __future__ import annotations

import pytest
import torch

from src.errors import RewardError
from src.rollout.measures import describe
from src.rollout.scoring import Scored
from tests.tiny import ragged_rollout


def scored(part: str) -> Scored:
    rollout = ragged_rollout()
    rows = len(rollout.prompts)
    scores = torch.arange(rows, dtype=torch.float32)
    return Scored(rollout, scores, torch.zeros(rollout.response_mask.shape), {part: torch.full((rows,), 7.0)}, 0)


def test_a_part_is_logged_by_its_name() -> None:
    found = describe(scored("length"), torch.zeros(1), torch.zeros(1, 1))
    assert found["rollout/score_length"] == 7.0


def test_a_part_with_the_name_of_a_metric_is_refused() -> None:
    """`rollout/score_std` is the deviation of the scores, of which pages and alarms speak."""
    with pytest.raises(RewardError, match="called 'std', and rollout/score_std is another metric"):
        describe(scored("std"), torch.zeros(1), torch.zeros(1, 1))
