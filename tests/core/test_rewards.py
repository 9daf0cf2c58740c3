"""One score per sequence, one reward per token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.core.rewards import set_missing_eos, subtract_missing_eos, token_rewards

KL_COEF = 0.3


def by_walking(scores: Tensor, credit: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
    """Reward by reward, row by row: the last token gets what of the score no token was credited with."""
    rewards = torch.zeros_like(kl)
    for b in range(mask.shape[0]):
        counted = [t for t in range(mask.shape[1]) if mask[b, t]]
        for t in counted:
            rest = scores[b] - sum(credit[b, i] for i in counted)
            rewards[b, t] = credit[b, t] - KL_COEF * kl[b, t] + (rest if t == counted[-1] else 0.0)
    return rewards


@pytest.fixture
def mask() -> Tensor:
    """Every mask of five tokens, one below the other: full, empty, ragged and with gaps."""
    return torch.cartesian_prod(*[torch.tensor([False, True])] * 5)


@pytest.fixture
def kl(mask: Tensor) -> Tensor:
    return torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def credit(mask: Tensor) -> Tensor:
    return torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def scores(mask: Tensor) -> Tensor:
    return torch.randn(len(mask), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_token_rewards_for_every_mask(scores: Tensor, kl: Tensor, mask: Tensor) -> None:
    """Checklist 16 and Checklist 18."""
    none = torch.zeros_like(kl)
    assert_close(token_rewards(scores, none, kl, mask, KL_COEF), by_walking(scores, none, kl, mask))


def test_credit_stays_with_its_token(scores: Tensor, credit: Tensor, kl: Tensor, mask: Tensor) -> None:
    """Checklist 16. And the row still sums to score - kl_coef * sum of the KL."""
    rewards = token_rewards(scores, credit, kl, mask, KL_COEF)
    assert_close(rewards, by_walking(scores, credit, kl, mask))
    assert_close(rewards.sum(1), (scores - KL_COEF * (kl * mask).sum(1)) * mask.any(1))


def test_credit_that_is_the_whole_score_leaves_nothing_for_the_last_token() -> None:
    credit, mask = torch.tensor([[0.5, -1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert_close(token_rewards(credit.sum(1), credit, torch.zeros(1, 3), mask, KL_COEF), credit)


def test_score_sits_once_on_the_last_valid_action() -> None:
    """Checklist 16 and Checklist 17. On the stop token, or on the last index of a response that fills the row."""
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 3), torch.zeros(3, 3), mask, KL_COEF)
    assert_close(rewards, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [3.0, 0.0, 0.0]]))


def test_kl_is_charged_over_the_response_only() -> None:
    """Checklist 18 and Checklist 11. The row sums to score - kl_coef * sum of the counted KL."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    kl = torch.tensor([[0.5, 0.25, 100.0], [1.0, -2.0, 3.0]], dtype=torch.float64)
    scores = torch.tensor([1.0, 2.0], dtype=torch.float64)
    totals = token_rewards(scores, torch.zeros_like(kl), kl, mask, KL_COEF).sum(1)
    assert_close(totals, torch.tensor([1 - KL_COEF * 0.75, 2 - KL_COEF * 2.0], dtype=torch.float64))


def test_row_without_a_counted_token_gets_nothing() -> None:
    """Checklist 12 and Checklist 13. Not its score either, even when that is no number."""
    mask = torch.tensor([[False, False], [True, True]])
    rewards = token_rewards(torch.tensor([math.nan, 1.0]), torch.zeros(2, 2), torch.full((2, 2), 2.0), mask, 0.5)
    assert_close(rewards, torch.tensor([[0.0, 0.0], [-1.0, 0.0]]))


def test_rewards_have_the_precision_of_the_kl() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    rewards = token_rewards(torch.ones(1), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.float64), mask, 0.1)
    assert rewards.dtype == torch.float64


def test_missing_eos_set_and_subtract() -> None:
    """Checklist 19. Finished responses keep their score under both; others lose it to the value, or pay the value."""
    scores, finished = torch.tensor([2.0, 2.0, -5.0]), torch.tensor([True, False, False])
    assert_close(set_missing_eos(scores, finished, -1.0), torch.tensor([2.0, -1.0, -1.0]))
    assert_close(subtract_missing_eos(scores, finished, 1.5), torch.tensor([2.0, 0.5, -6.5]))


def test_set_forgets_the_score_of_an_unfinished_response() -> None:
    """Checklist 19. Value and gradient: whatever the score was, it does not matter."""
    scores = torch.tensor([2.0, math.nan], requires_grad=True)
    shaped = set_missing_eos(scores, torch.tensor([True, False]), -1.0)
    assert_close(shaped.detach(), torch.tensor([2.0, -1.0]))
    (gradient,) = torch.autograd.grad(shaped.sum(), scores)
    assert_close(gradient, torch.tensor([1.0, 0.0]))
