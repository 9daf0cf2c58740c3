"""GAE against its definition as a sum, its two ends, and the sequence without its gaps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from src.core.advantages import gae, lambda_returns
from src.core.estimators import GAE
from src.core.masking import whiten
from src.errors import SettingError
from src.types import Episodes

LENGTH = 6
discounts = pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 1.0), (0.5, 0.95)])


@pytest.fixture
def ragged() -> Tensor:
    """Right-padded rows of all lengths from 0 to 6."""
    return torch.arange(LENGTH) < torch.arange(LENGTH + 1).unsqueeze(1)


def credit(estimator: GAE, rewards: Tensor, mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What an estimator makes of one sample per prompt."""
    episodes = Episodes(rewards=rewards, mask=mask, group_ids=torch.arange(len(mask)), old_values=values)
    return estimator.advantages(episodes), estimator.returns(episodes)


def td_errors(rewards: list[float], values: list[float], gamma: float) -> list[float]:
    """delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the end."""
    return [r + gamma * after - v for r, v, after in zip(rewards, values, [*values, 0.0][1:], strict=True)]


def discounted(terms: list[float], factor: float) -> list[float]:
    """sum_l factor^l x_{t+l} for each t."""
    return [sum(factor**k * x for k, x in enumerate(terms[t:])) for t in range(len(terms))]


def gae_by_definition(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_l (gamma lam)^l delta_{t+l} of each row's counted tokens alone, put back to where they were."""
    advantages = torch.zeros_like(rewards)
    for b, row in enumerate(mask):
        deltas = td_errors(rewards[b, row].tolist(), values[b, row].tolist(), gamma)
        advantages[b, row] = torch.tensor(discounted(deltas, gamma * lam), dtype=rewards.dtype)
    return advantages


def gae_by_backward_loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The classical recursion on one row without padding."""
    advantages: list[float] = []
    following = value_after = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        following = reward + gamma * value_after - value + gamma * lam * following
        value_after = value
        advantages.insert(0, following)
    return advantages


@discounts
def test_gae_by_definition_for_every_mask(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> None:
    """Checklist 34 and Checklist 37. Also 0 outside the mask and in the row in which none counts (Checklist 12)."""
    assert_close(gae(rewards, values, mask, gamma, lam), gae_by_definition(rewards, values, mask, gamma, lam))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.lists(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), max_size=7), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_by_backward_loop_on_ragged_rows(rows: list[list[tuple[float, float]]], gamma: float, lam: float) -> None:
    """Checklist 36. Each row by itself, then all of them padded on the right with 55."""
    width = max([1, *(len(row) for row in rows)])
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in rows])
    rewards, values = torch.full((2, len(rows), width), 55.0, dtype=torch.float64)
    expected = torch.zeros_like(rewards)
    for b, row in enumerate(rows):
        r, v = [pair[0] for pair in row], [pair[1] for pair in row]
        loop = gae_by_backward_loop(r, v, gamma, lam)
        for target, numbers in ((rewards, r), (values, v), (expected, loop)):
            target[b, : len(row)] = torch.tensor(numbers, dtype=torch.float64)
    assert_close(gae(rewards, values, mask, gamma, lam), expected)


def test_without_discount_and_critic_it_is_the_reward_to_go(rewards: Tensor, ragged: Tensor) -> None:
    """Checklist 34. gae(1, 1, V = 0)_t = r_t + r_{t+1} + ..., by a flipped cumulative sum."""
    rewards = rewards[: len(ragged)]
    to_go = (rewards * ragged).flip(1).cumsum(1).flip(1) * ragged
    assert_close(gae(rewards, torch.zeros_like(rewards), ragged, 1.0, 1.0), to_go)


def test_lambda_one_is_reward_to_go_minus_value(rewards: Tensor, values: Tensor, ragged: Tensor) -> None:
    """Checklist 34. The values in between telescope away."""
    rewards, values = rewards[: len(ragged)], values[: len(ragged)]
    to_go = (rewards * ragged).flip(1).cumsum(1).flip(1)
    assert_close(gae(rewards, values, ragged, 1.0, 1.0), (to_go - values) * ragged)


def test_lambda_zero_is_the_td_error(rewards: Tensor, values: Tensor, ragged: Tensor) -> None:
    """Checklist 34 and Checklist 35. Nothing is bootstrapped after the last counted token."""
    rewards, values = rewards[: len(ragged)], values[: len(ragged)]
    values_after = torch.cat([(values * ragged)[:, 1:], torch.zeros(len(ragged), 1, dtype=values.dtype)], dim=1)
    assert_close(gae(rewards, values, ragged, 0.9, 0.0), (rewards + 0.9 * values_after - values) * ragged)


def test_nothing_is_bootstrapped_at_the_end() -> None:
    """Checklist 35. Cut off or stopped, in the middle of the row or at its end: delta of the last token is r - V."""
    rewards, values = torch.full((2, 3), 2.0), torch.tensor([[0.5, 0.5, 100.0], [0.5, 0.5, 0.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages = gae(rewards, values, mask, 1.0, 0.0)
    assert_close(advantages, torch.tensor([[2.0, 1.5, 0.0], [2.0, 2.0, 1.5]]))


@discounts
@pytest.mark.parametrize("junk", [0.0, 7.0, math.nan, math.inf])
def test_right_padding_changes_nothing(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, junk: float
) -> None:
    """Checklist 36, Checklist 11 and Checklist 13."""
    padding = torch.full((len(mask), 3), junk, dtype=torch.float64)
    longer = gae(
        torch.cat([rewards, padding], 1),
        torch.cat([values, padding], 1),
        torch.cat([mask, torch.zeros_like(padding, dtype=torch.bool)], 1),
        gamma,
        lam,
    )
    assert_close(longer[:, :LENGTH], gae(rewards, values, mask, gamma, lam))
    assert_close(longer[:, LENGTH:], torch.zeros_like(padding))


@discounts
def test_gaps_are_skipped(gamma: float, lam: float) -> None:
    """Checklist 37. Tool output in the middle: neither discounted through nor read."""
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.3, -0.7, 0.2]])
    with_gap = torch.tensor([[True, False, False, True, False, True]])
    spread_rewards, spread_values = (torch.full((1, 6), 44.0).masked_scatter(with_gap, x) for x in (rewards, values))
    collapsed = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma, lam)
    assert_close(gae(spread_rewards, spread_values, with_gap, gamma, lam)[with_gap], collapsed[0])


def test_a_perfect_critic_leaves_no_advantage(rewards: Tensor, ragged: Tensor) -> None:
    """V_t = sum_l gamma^l r_{t+l} satisfies the Bellman equation, whatever lambda."""
    rewards = rewards[: len(ragged)] * ragged
    values = torch.tensor([discounted(row, 0.9) for row in rewards.tolist()], dtype=torch.float64)
    assert_close(gae(rewards, values, ragged, 0.9, 0.6), torch.zeros_like(rewards))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_returns_are_monte_carlo(rewards: Tensor, values: Tensor, ragged: Tensor, gamma: float) -> None:
    """Checklist 34. R_t = sum_l gamma^l r_{t+l}; the critic drops out."""
    rewards, values = rewards[: len(ragged)], values[: len(ragged)]
    expected = torch.tensor([discounted(row, gamma) for row in (rewards * ragged).tolist()], dtype=torch.float64)
    assert_close(lambda_returns(rewards, values, ragged, gamma, 1.0), expected)


def test_lambda_returns_average_the_n_step_returns() -> None:
    """Checklist 34. R_t = (1 - lam) sum_{n<N} lam^(n-1) G_n + lam^(N-1) G_N, N steps before the end."""
    rewards, values, gamma, lam = [1.0, -0.5, 2.0, 0.3], [0.2, 0.9, -0.4, 0.6], 0.9, 0.7

    def n_step(t: int, n: int) -> float:
        bootstrap = gamma**n * values[t + n] if t + n < 4 else 0.0
        return sum(gamma**k * rewards[t + k] for k in range(n)) + bootstrap

    def average(t: int) -> float:
        left = 4 - t
        return (1 - lam) * sum(lam ** (n - 1) * n_step(t, n) for n in range(1, left)) + lam ** (left - 1) * n_step(
            t, left
        )

    actual = lambda_returns(
        torch.tensor([rewards], dtype=torch.float64),
        torch.tensor([values], dtype=torch.float64),
        torch.ones(1, 4, dtype=torch.bool),
        gamma,
        lam,
    )
    assert_close(actual, torch.tensor([[average(t) for t in range(4)]], dtype=torch.float64))


def test_estimator_gives_the_actor_lam_and_the_critic_critic_lam(rewards: Tensor, values: Tensor, mask: Tensor) -> None:
    """Checklist 34. critic_lam = 1: Monte-Carlo returns (0 outside), while the advantages keep their own lambda."""
    advantages, returns = credit(GAE(gamma=0.9, lam=0.4, critic_lam=1.0), rewards, mask, values)
    assert_close(advantages, gae_by_definition(rewards, values, mask, 0.9, 0.4))
    assert_close(returns, gae_by_definition(rewards, torch.zeros_like(values), mask, 0.9, 1.0))


def test_returns_are_raw_advantages_plus_values(rewards: Tensor, values: Tensor, mask: Tensor) -> None:
    """Checklist 34. Of the advantages as they were before whitening."""
    advantages, returns = credit(GAE(gamma=0.9, lam=0.8, critic_lam=0.8), rewards, mask, values)
    assert_close(returns, (advantages + values) * mask)
    assert not torch.allclose(returns, (whiten(advantages, mask) + values) * mask)


def test_estimator_says_what_it_needs() -> None:
    assert GAE.needs_values is True


@pytest.mark.parametrize("name", ["gamma", "lam", "critic_lam"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_discounts_outside_0_1_are_refused(name: str, value: float) -> None:
    settings = {"gamma": 1.0, "lam": 1.0, "critic_lam": 1.0} | {name: value}
    with pytest.raises(SettingError) as error:
        GAE(**settings)
    assert (error.value.name, repr(error.value.value)) == (name, repr(value))
    assert str(error.value).startswith(f"{name} must be between 0 and 1")


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0])
def test_both_ends_are_allowed(value: float) -> None:
    assert GAE(gamma=value, lam=value, critic_lam=value).lam == value
