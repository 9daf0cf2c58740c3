"""The rows of the table of learning are different algorithms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from benchmarks.learning import EQUAL, options
from src.core.estimators import GroupRelative, LeaveOneOut
from src.core.masking import whiten
from src.types import Episodes
from tests.objectives.page import chosen

MASK = torch.arange(6) < torch.tensor([6, 3, 5, 2, 4, 6, 1, 3]).unsqueeze(1)


def episodes(seed: int) -> Episodes:
    draws = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, *MASK.shape, dtype=torch.float64, generator=draws) * MASK
    greedy = torch.randn(8, dtype=torch.float64, generator=draws)
    return Episodes(
        rewards=rewards, mask=MASK, group_ids=torch.arange(8) // 4, old_values=values, greedy_scores=greedy
    )  # fmt: skip


def whitened(name: str) -> torch.Tensor:
    """Phi_t of the second of two batches, whitened, so that estimators with a memory have one."""
    estimator: Any = chosen(f"advantage={name}", "advantage")
    estimator.update(episodes(1))
    return whiten(estimator.advantages(episodes(2)), MASK)


def test_rows_that_are_merged_are_one_algorithm() -> None:
    for name, others in EQUAL.items():
        for other in others:
            torch.testing.assert_close(whitened(other), whitened(name), atol=1e-5, rtol=0)


def test_rows_that_are_left_differ() -> None:
    for one, other in itertools.combinations(options("advantage"), 2):
        assert float((whitened(one) - whitened(other)).abs().max()) > 1e-2, (one, other)


@pytest.mark.parametrize("seed", [3, 4])
def test_without_the_division_the_groups_are_leave_one_out(seed: int) -> None:
    batch = episodes(seed)
    plain, rloo = (estimator.advantages(batch) for estimator in (GroupRelative(False), LeaveOneOut()))
    torch.testing.assert_close(whiten(plain, MASK), whiten(rloo, MASK), atol=1e-7, rtol=0)
