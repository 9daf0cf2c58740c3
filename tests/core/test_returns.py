"""Returns, TD errors and the batch's mean as a baseline; GAE lies between two of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from src.core.advantages import (
    batch_mean_baseline,
    discounted_sum,
    gae,
    lambda_returns,
    reward_to_go,
    td_errors,
    total_return,
)

LENGTH = 6
gammas = pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5, 0.0])
quick = settings(deadline=None, derandomize=True, max_examples=60)

Row = list[float]


def returns_by_loop(rewards: Row, gamma: float) -> Row:
    """The classical recursion on one row without padding: G_t = r_t + gamma G_{t+1}."""
    returns: Row = []
    following = 0.0
    for reward in reversed(rewards):
        following = reward + gamma * following
        returns.insert(0, following)
    return returns


def row_by_row(function: Callable[..., Row], mask: Tensor, *per_token: Tensor) -> Tensor:
    """A function of the lists of counted tokens, row by row, put back to where they were; 0 elsewhere."""
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(mask):
        result[b, row] = torch.tensor(function(*(x[b, row].tolist() for x in per_token)), dtype=torch.float64)
    return result


@gammas
def test_reward_to_go_by_backward_loop_for_every_mask(rewards: Tensor, mask: Tensor, gamma: float) -> None:
    """Checklist 34 and Checklist 37. Also 0 outside the mask and in the row in which none counts (Checklist 12)."""
    expected = row_by_row(lambda r: returns_by_loop(r, gamma), mask, rewards)
    assert_close(reward_to_go(rewards, mask, gamma), expected)
    assert_close(discounted_sum(rewards, mask, gamma), expected)


@quick
@given(rows=st.lists(st.lists(st.floats(-9, 9), max_size=7), min_size=1, max_size=4), gamma=st.floats(0, 1))
def test_reward_to_go_on_ragged_rows(rows: list[Row], gamma: float) -> None:
    """Checklist 36. Each row by itself, then all of them padded on the right with 55."""
    width = max([1, *(len(row) for row in rows)])
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in rows])
    rewards = torch.tensor([row + [55.0] * (width - len(row)) for row in rows], dtype=torch.float64)
    loops = [returns_by_loop(row, gamma) + [0.0] * (width - len(row)) for row in rows]
    assert_close(reward_to_go(rewards, mask, gamma), torch.tensor(loops, dtype=torch.float64))


@gammas
def test_total_return_is_the_reward_to_go_of_the_first_token(rewards: Tensor, mask: Tensor, gamma: float) -> None:
    """At every counted token, and discounted from the first of them wherever in the row it stands."""

    def everywhere(row: Row) -> Row:
        return [sum(gamma**t * r for t, r in enumerate(row))] * len(row)

    total = total_return(rewards, mask, gamma)
    assert_close(total, row_by_row(everywhere, mask, rewards))
    to_go = reward_to_go(rewards, mask, gamma)
    for b in range(1, len(mask)):
        first = mask[b].tolist().index(True)
        assert_close(total[b, first], to_go[b, first])


def test_a_reward_at_the_end_is_returned_to_every_token(mask: Tensor) -> None:
    """Without discount nothing is past before the end: the total is the reward to go, and both are the score."""
    scores = torch.randn(len(mask), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    at_the_end = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(1, len(mask)):
        at_the_end[b, max(t for t in range(LENGTH) if mask[b, t])] = scores[b]
    expected = scores.unsqueeze(1) * mask
    assert_close(total_return(at_the_end, mask, 1.0), expected)
    assert_close(reward_to_go(at_the_end, mask, 1.0), expected)


def test_a_reward_before_the_end_tells_the_two_apart() -> None:
    """The past counts in the total, not in the reward to go."""
    rewards, mask = torch.tensor([[3.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert_close(total_return(rewards, mask, 0.5), torch.tensor([[3.5, 3.5]]))
    assert_close(reward_to_go(rewards, mask, 0.5), torch.tensor([[3.5, 1.0]]))


@gammas
def test_td_errors_by_loop_for_every_mask(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> None:
    """Checklist 35 and Checklist 37. After a gap comes the next counted token's value; after the last 0."""

    def loop(rewards: Row, values: Row) -> Row:
        after = [*values[1:], 0.0]
        return [rewards[t] + gamma * after[t] - values[t] for t in range(len(rewards))]

    assert_close(td_errors(rewards, values, mask, gamma), row_by_row(loop, mask, rewards, values))


@gammas
def test_gae_lies_between_td_error_and_return(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> None:
    """Checklist 34. GAE(0) = delta, GAE(1) = G - V, whatever the mask; the targets of the critic likewise."""
    nothing = torch.zeros_like(values)
    to_go, deltas = reward_to_go(rewards, mask, gamma), td_errors(rewards, values, mask, gamma)
    assert_close(gae(rewards, values, mask, gamma, 0.0), deltas)
    assert_close(gae(rewards, values, mask, gamma, 1.0), to_go - values * mask)
    assert_close(gae(rewards, nothing, mask, gamma, 1.0), to_go)
    assert_close(lambda_returns(rewards, values, mask, gamma, 1.0), to_go)
    assert_close(lambda_returns(rewards, values, mask, gamma, 0.0), deltas + values * mask)


@gammas
def test_td_errors_without_a_critic_are_the_rewards(rewards: Tensor, mask: Tensor, gamma: float) -> None:
    """Checklist 34. delta = r where V = 0."""
    assert_close(td_errors(rewards, torch.zeros_like(rewards), mask, gamma), rewards * mask)


@gammas
def test_the_mean_of_the_batch_is_one_number_for_all_tokens(rewards: Tensor, mask: Tensor, gamma: float) -> None:
    """Of the counted tokens, not of the rows: the advantages sum to 0 and differ as the returns do."""
    to_go = [returns_by_loop(rewards[b, row].tolist(), gamma) for b, row in enumerate(mask)]
    counted = [g for row in to_go for g in row]
    baseline = sum(counted) / len(counted)
    actual = batch_mean_baseline(rewards, mask, gamma)
    assert_close(actual, row_by_row(lambda r: [g - baseline for g in returns_by_loop(r, gamma)], mask, rewards))
    assert_close(actual.sum(), torch.tensor(0.0, dtype=torch.float64))
