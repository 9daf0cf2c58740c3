"""Each choice of Phi_t against a loop over Python lists, what it needs, and what it remembers."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.core import estimators
from src.core.estimators import (
    GAE,
    BatchMeanBaseline,
    Estimator,
    GreedyBaseline,
    GroupRelative,
    LeaveOneOut,
    NormalizedReturn,
    RewardToGo,
    RunningMeanBaseline,
    TDError,
    TotalReturn,
    ValueBaseline,
)
from src.errors import SettingError
from src.types import Episodes

GAMMA, LAM = 0.9, 0.6


class Row:
    """One response as lists of its counted tokens."""

    def __init__(self, episodes: Episodes, b: int) -> None:
        assert episodes.old_values is not None
        assert episodes.greedy_scores is not None
        counted = episodes.mask[b]
        self.rewards: list[float] = episodes.rewards[b, counted].tolist()
        self.values: list[float] = episodes.old_values[b, counted].tolist()
        self.group = int(episodes.group_ids[b])
        self.greedy = float(episodes.greedy_scores[b])

    @property
    def score(self) -> float:
        return sum(self.rewards)

    def to_go(self) -> list[float]:
        return [sum(GAMMA**k * r for k, r in enumerate(self.rewards[t:])) for t in range(len(self.rewards))]

    def deltas(self) -> list[float]:
        after = [*self.values[1:], 0.0]
        return [r + GAMMA * v_next - v for r, v_next, v in zip(self.rewards, after, self.values, strict=False)]

    def everywhere(self, number: float) -> list[float]:
        return [number] * len(self.rewards)


Loop = Callable[[list[Row]], list[list[float]]]


def batch_mean(rows: list[Row]) -> list[list[float]]:
    mean = statistics.fmean(g for row in rows for g in row.to_go())
    return [[g - mean for g in row.to_go()] for row in rows]


def normalized(rows: list[Row]) -> list[list[float]]:
    """The constant of `whiten` is inside the root."""
    root = math.sqrt(statistics.variance([g for row in rows for g in row.to_go()]) + 1e-8)
    return [[a / root for a in row] for row in batch_mean(rows)]


def gae(rows: list[Row]) -> list[list[float]]:
    return [
        [sum((GAMMA * LAM) ** k * d for k, d in enumerate(row.deltas()[t:])) for t in range(len(row.rewards))]
        for row in rows
    ]


def leave_one_out(rows: list[Row]) -> list[list[float]]:
    def advantage(row: Row) -> float:
        others = [other.score for other in rows if other.group == row.group and other is not row]
        return row.score - statistics.fmean(others) if others else 0.0

    return [row.everywhere(advantage(row)) for row in rows]


def group_relative(rows: list[Row], scale: bool) -> list[list[float]]:
    def advantage(row: Row) -> float:
        scores = [other.score for other in rows if other.group == row.group]
        divisor = statistics.stdev(scores) + 1e-6 if scale and len(scores) > 1 else 1.0
        return (row.score - statistics.fmean(scores)) / divisor

    return [row.everywhere(advantage(row)) for row in rows]


class Case(NamedTuple):
    """An estimator, the same as a loop, and what it needs: "values", "groups", "greedy" or nothing."""

    estimator: Estimator
    loop: Loop
    needs: str = ""


CASES: dict[str, Case] = {
    "total_return": Case(TotalReturn(GAMMA), lambda rows: [row.everywhere((row.to_go() or [0.0])[0]) for row in rows]),
    "reward_to_go": Case(RewardToGo(GAMMA), lambda rows: [row.to_go() for row in rows]),
    "baseline_batch": Case(BatchMeanBaseline(GAMMA), batch_mean),
    "reinforce_pp": Case(NormalizedReturn(GAMMA), normalized),
    "baseline_running": Case(RunningMeanBaseline(GAMMA, 0.9), lambda rows: [row.to_go() for row in rows]),  # b = 0 yet
    "baseline_value": Case(
        ValueBaseline(GAMMA, 1.0),
        lambda rows: [[g - v for g, v in zip(row.to_go(), row.values, strict=True)] for row in rows],
        "values",
    ),
    "td": Case(TDError(GAMMA, 1.0), lambda rows: [row.deltas() for row in rows], "values"),
    "gae": Case(GAE(gamma=GAMMA, lam=LAM, critic_lam=1.0), gae, "values"),
    "rloo": Case(LeaveOneOut(), leave_one_out, "groups"),
    "grpo": Case(GroupRelative(group_scale=True), lambda rows: group_relative(rows, True), "groups"),
    "dr_grpo": Case(GroupRelative(group_scale=False), lambda rows: group_relative(rows, False), "groups"),
    "remax": Case(
        GreedyBaseline(GAMMA), lambda rows: [[g - row.greedy for g in row.to_go()] for row in rows], "greedy"
    ),
}
CRITICS = {name for name, case in CASES.items() if case.needs == "values"}
choices = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def episodes() -> Episodes:
    """Ragged rows, gaps and an empty row; groups of four, two and one, interleaved; 0 outside the mask."""
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5, 0, 2, 4]).unsqueeze(1)
    mask[0, 2] = mask[3, 0] = mask[3, 3] = False
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 7, 6, dtype=torch.float64, generator=generator) * mask
    greedy = torch.randn(7, dtype=torch.float64, generator=generator)
    group_ids = torch.tensor([40, -3, 40, 40, 8, -3, 40])
    return Episodes(rewards=rewards, mask=mask, group_ids=group_ids, old_values=values, greedy_scores=greedy)


@choices
def test_advantages_by_loop(name: str, episodes: Episodes) -> None:
    """Checklist 37. Tokens between the counted ones are as if they were not there; 0 outside the mask."""
    estimator, loop, _ = CASES[name]
    expected = torch.zeros_like(episodes.rewards)
    for b, advantages in enumerate(loop([Row(episodes, b) for b in range(len(episodes.mask))])):
        expected[b, episodes.mask[b]] = torch.tensor(advantages, dtype=torch.float64)
    assert_close(estimator.advantages(episodes), expected)


def test_every_estimator_is_compared_with_a_loop() -> None:
    concrete = {kind for kind in vars(estimators).values() if inspect.isclass(kind) and issubclass(kind, Estimator)}
    missing = {kind for kind in concrete if not inspect.isabstract(kind)} - {type(c.estimator) for c in CASES.values()}
    assert not missing, f"add {', '.join(sorted(kind.__name__ for kind in missing))} to CASES in this file"


@choices
def test_gaps_are_skipped(name: str, episodes: Episodes) -> None:
    """Checklist 37. A row moved apart by tool output, with 44 in between, is credited as the row without it."""
    estimator = CASES[name].estimator
    wide = torch.zeros(7, 12, dtype=torch.bool)
    wide[:, ::2] = episodes.mask

    def spread(x: Tensor | None) -> Tensor:
        assert x is not None
        return torch.full((7, 12), 44.0, dtype=x.dtype).masked_scatter(wide, x[episodes.mask])

    apart = replace(episodes, rewards=spread(episodes.rewards), mask=wide, old_values=spread(episodes.old_values))
    assert_close(estimator.advantages(apart)[:, ::2], estimator.advantages(episodes))
    assert_close(estimator.advantages(apart)[:, 1::2], torch.zeros(7, 6, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(CRITICS))
@pytest.mark.parametrize("critic_lam", [1.0, 0.3])
def test_the_critic_learns_lambda_returns(name: str, critic_lam: float, episodes: Episodes) -> None:
    """Checklist 34. R_t = sum_l (gamma critic_lam)^l delta_{t+l} + V_t, whatever the actor is credited with."""
    estimator: Any = replace(CASES[name].estimator, critic_lam=critic_lam)  # type: ignore[type-var]
    expected = torch.zeros_like(episodes.rewards)
    for b, counted in enumerate(episodes.mask):
        row, ahead = Row(episodes, b), 0.0
        targets: list[float] = []
        for delta, value in zip(reversed(row.deltas()), reversed(row.values), strict=True):
            ahead = delta + GAMMA * critic_lam * ahead
            targets.insert(0, ahead + value)
        expected[b, counted] = torch.tensor(targets, dtype=torch.float64)
    actual = estimator.returns(episodes)
    assert actual is not None
    assert_close(actual, expected)


@choices
def test_each_asks_for_what_it_reads(name: str, episodes: Episodes) -> None:
    """A critic, groups or the greedy response: with less the needy ones refuse and the others do not care."""
    estimator, _, needs = CASES[name]
    declared = {need: getattr(estimator, f"needs_{need}") for need in ("values", "groups", "greedy")}
    assert [need for need, needed in declared.items() if needed] == [needs] * bool(needs)
    bare = replace(episodes, old_values=None, greedy_scores=None)
    if estimator.needs_values or estimator.needs_greedy:
        with pytest.raises(ValueError, match="needs_values and needs_greedy"):
            estimator.advantages(bare)
    else:
        assert_close(estimator.advantages(bare), estimator.advantages(episodes))
    if estimator.needs_values:
        with pytest.raises(ValueError, match="needs_values"):
            estimator.returns(bare)
    else:
        assert estimator.returns(episodes) is None


@pytest.mark.parametrize("name", [name for name in CASES if name != "baseline_running"])
def test_all_others_remember_nothing(name: str, episodes: Episodes) -> None:
    """Checklist 61. Nothing for a checkpoint, and a batch seen before changes nothing."""
    estimator = CASES[name].estimator
    before = estimator.advantages(episodes)
    estimator.update(episodes)
    estimator.load_state_dict(estimator.state_dict())
    assert estimator.state_dict() == {}
    assert_close(estimator.advantages(episodes), before)


def batch_of(returns: list[float]) -> Episodes:
    """One token per response."""
    rewards = torch.tensor(returns, dtype=torch.float64).unsqueeze(1)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    return Episodes(rewards=rewards, mask=mask, group_ids=torch.arange(len(returns)))


def test_the_running_baseline_is_the_decayed_mean_of_the_past() -> None:
    """b = sum_k d^(n-k) mean_k / sum_k d^(n-k) over the batches before this one, 0 in the first."""
    estimator, decay, means = RunningMeanBaseline(GAMMA, 0.7), 0.7, [2.0, -1.0, 4.0, 0.5]
    for n, mean in enumerate(means):
        weights = [decay ** (n - 1 - k) for k in range(n)]
        past = sum(w * m for w, m in zip(weights, means, strict=False)) / sum(weights) if n else 0.0
        batch = batch_of([mean - 3.0, mean + 1.0, mean + 2.0])
        expected = torch.tensor([[mean - 3.0 - past], [mean + 1.0 - past], [mean + 2.0 - past]], dtype=torch.float64)
        assert_close(estimator.advantages(batch), expected)
        assert_close(estimator.advantages(batch), expected)  # asking is not remembering
        estimator.update(batch)


def test_the_running_baseline_takes_discounted_returns_of_counted_tokens(episodes: Episodes) -> None:
    """After one batch b is the mean of G over its tokens, not over its rows."""
    estimator = RunningMeanBaseline(GAMMA, 0.99)
    estimator.update(episodes)
    mean = statistics.fmean(g for b in range(len(episodes.mask)) for g in Row(episodes, b).to_go())
    expected = (RewardToGo(GAMMA).advantages(episodes) - mean) * episodes.mask
    assert_close(estimator.advantages(episodes), expected)


def test_the_running_baseline_survives_a_checkpoint() -> None:
    """Checklist 61. Another one, told the state, goes on as the first does."""
    one, two = RunningMeanBaseline(GAMMA, 0.7), RunningMeanBaseline(GAMMA, 0.7)
    for mean in (2.0, -1.0):
        one.update(batch_of([mean]))
    two.load_state_dict(one.state_dict())
    for estimator in (one, two):
        estimator.update(batch_of([5.0]))
    assert two.state_dict() == one.state_dict()
    assert_close(one.advantages(batch_of([0.0])), two.advantages(batch_of([0.0])))


@pytest.mark.parametrize(
    "make",
    [TotalReturn, RewardToGo, BatchMeanBaseline, NormalizedReturn, GreedyBaseline,
     lambda gamma: RunningMeanBaseline(gamma, 0.5), lambda gamma: ValueBaseline(gamma, 1.0),
     lambda gamma: TDError(gamma, 1.0)],
)  # fmt: skip
@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_discounts_outside_0_1_are_refused(make: Callable[[float], Any], gamma: float) -> None:
    with pytest.raises(SettingError, match="gamma must be between 0 and 1"):
        make(gamma)


@pytest.mark.parametrize("estimator", [ValueBaseline, TDError])
def test_a_lambda_of_the_critic_outside_0_1_is_refused(estimator: Any) -> None:
    with pytest.raises(SettingError, match="critic_lam must be between 0 and 1"):
        estimator(gamma=1.0, critic_lam=1.5)


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_a_decay_that_takes_nothing_in_is_refused(decay: float) -> None:
    with pytest.raises(SettingError, match="baseline_decay"):
        RunningMeanBaseline(1.0, decay)


def test_a_running_baseline_without_memory_is_the_last_batch() -> None:
    """baseline_decay = 0 is allowed: b is the mean of the batch just before."""
    estimator = RunningMeanBaseline(gamma=1.0, baseline_decay=0.0)
    for mean in (5.0, 3.0):
        estimator.update(batch_of([mean - 1, mean + 1]))
    assert estimator.advantages(batch_of([4.0, 0.0])).tolist() == [[1.0], [-3.0]]


def test_the_value_that_is_refused_is_named() -> None:
    """A message is built from it."""
    with pytest.raises(SettingError) as error:
        RunningMeanBaseline(gamma=1.0, baseline_decay=1.5)
    assert (error.value.name, error.value.value) == ("baseline_decay", 1.5)
