"""What is optimized is what is asked for: gradients at the known optimum, through the real maker and loss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from src.core.advantages import group_relative, leave_one_out
from src.core.estimators import GAE
from src.core.policy_losses import ClippedSurrogate
from src.rollout.experience import ReferenceKL
from tests.objectives.bandit import LONGEST, STATES, Table, gradient, logits, optimal_values, states_of
from tests.objectives.enumeration import Problem, all_responses, distance
from tests.objectives.fixed_points import START, train
from tests.objectives.page import (
    ADVANTAGES,
    AGGREGATIONS,
    ESTIMATORS,
    LOSSES,
    MEANING,
    PAIRS,
    SEED,
    accepted,
    measured,
    page,
)

ROOT = Path(__file__).parents[2]
ACCEPTED: list[dict[str, Any]] = [
    *({"advantage": name} for name in ADVANTAGES),
    *({"policy_loss": name} for name in LOSSES),
    {"aggregation": "constant_length"},
]


@pytest.mark.parametrize(("place", "kind"), PAIRS)
@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_at_the_optimum_the_gradient_is_0(place: str, kind: str, settings: dict[str, Any]) -> None:
    """Of responses of unequal length, each in its exact share."""
    if not accepted(place, settings):
        pytest.skip("the configuration refuses them together")
    assert float(measured(place, kind, **settings).abs().max()) < 1e-6


@pytest.mark.parametrize(("place", "kind"), PAIRS)
def test_whitened_advantages_keep_the_optimum(place: str, kind: str) -> None:
    """With k1 all advantages are rounding of float32 scores there, which whitening enlarges up to 1e4 times."""
    limit = 1e-4 if kind == "k1" else 1e-6
    assert float(measured(place, kind, whiten_advantages=True).abs().max()) < limit


@pytest.mark.parametrize(("place", "kind"), [key for key, meaning in MEANING.items() if meaning.startswith("refused")])
def test_what_is_refused_has_another_optimum(place: str, kind: str) -> None:
    """Or none at all; the gradient at pi* is far from 0."""
    assert float(measured(place, kind).abs().max()) > 0.01
    assert Problem(logits(SEED), place, kind).fixed_point() is None


@pytest.mark.parametrize("settings", [{"aggregation": "sequence_mean"}, {"advantage": "reinforce_pp"}], ids=str)
def test_what_is_refused_with_both_parts_moves_the_optimum(settings: dict[str, str]) -> None:
    assert float(measured("both", "exact", **settings).abs().max()) > 1e-3


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_of_a_group_shortens_the_gradient_and_rloo_does_not(size: int) -> None:
    """Over all groups of samples E[A_i grad log pi(a_i)] is (N - 1) / N of that of R, so kl=both would be uneven."""
    draws = torch.Generator().manual_seed(3)
    logits, returns = (torch.randn(4, dtype=torch.float64, generator=draws) for _ in range(2))
    logprobs = logits.log_softmax(-1)
    probabilities, scores_of = logprobs.exp(), torch.eye(4, dtype=torch.float64) - logprobs.exp()
    whole = (probabilities * returns) @ scores_of
    found = {"group_relative": torch.zeros_like(whole), "rloo": torch.zeros_like(whole)}
    for group in itertools.product(range(4), repeat=size):
        rows, one = torch.tensor(group), torch.zeros(size, dtype=torch.int64)
        chance = probabilities[rows].prod()
        found["rloo"] += chance * (leave_one_out(returns[rows], one) @ scores_of[rows]) / size
        found["group_relative"] += chance * (group_relative(returns[rows], one, scale=False) @ scores_of[rows]) / size
    assert_close(found["rloo"], whole)
    assert_close(found["group_relative"], whole * (size - 1) / size)


@pytest.mark.parametrize("place", ["reward", "loss", "both"])
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_gradient_of_the_code_is_that_of_an_enumeration(place: str, kind: str) -> None:
    """The sum over responses of probability times gradient, written down again; here the mean over responses."""
    found = measured(place, kind, advantage="reward_to_go", aggregation="constant_length") * LONGEST
    assert_close(found, Problem(logits(SEED), place, kind).gradient(logits(0)), atol=1e-7, rtol=0)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("kind", ["exact", "k3"])
def test_both_parts_have_the_expected_gradient_of_k1(kind: str, whiten: bool) -> None:
    """Far from the optimum, with gamma and lambda below 1, a random critic, and responses of unequal length."""
    critic = torch.randn(len(STATES), dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    gae = GAE(gamma=0.9, critic_lam=0.95, lam=0.7)
    found = []
    for place, estimator in (("reward", "k1"), ("both", kind)):
        where = ReferenceKL(True, place == "both", ESTIMATORS[estimator])
        roles = Table(logits(0), logits(7), critic)
        slope, experience = gradient(
            where, roles, whiten_rewards=False, whiten_advantages=whiten, advantage=gae,
            policy_loss=ClippedSurrogate(0.2, 0.2), aggregation=AGGREGATIONS["token_mean"],
        )  # fmt: skip
        scale = experience.loss_kl_coef / 0.3 if place == "both" and whiten else 1.0
        deviation = experience.advantages[experience.mask].std(correction=1)
        assert not whiten or float(deviation) == pytest.approx(1, abs=1e-4)
        found.append(slope / scale if place == "both" else slope)
    if whiten:  # the two are each divided by another deviation, so their directions are compared
        found = [slope / slope.norm() for slope in found]
    assert float(found[0].abs().max()) > 0.01
    assert_close(found[0], found[1], atol=1e-10 if not whiten else 1e-7, rtol=0)


def test_the_enumeration_finds_the_optimum_from_elsewhere() -> None:
    """The yardstick itself: from another table, descent along the gradient of k1 in the reward ends at pi*."""
    problem = Problem(logits(SEED), "reward", "k1")
    table = logits(4)
    for _ in range(6000):
        table = table - problem.gradient(table)
    assert distance(problem, logits(4)) > 0.1
    assert distance(problem, table) < 1e-6
    assert float(Table(logits(0), logits(1), optimal_values(logits(1))).known.std()) > 0.01  # type: ignore[union-attr]


@pytest.mark.parametrize(("place", "kind"), [("reward", "k1"), ("both", "exact")])
def test_samples_lead_to_the_optimum(place: str, kind: str) -> None:
    """What `make fixed-points` does for every setting, in few steps."""
    start = distance(Problem(logits(SEED), place, kind), logits(START))
    left = train(place, kind, 12, seed=1)
    assert left < 0.7 * start


def test_the_numbers_of_states_are_those_of_the_list() -> None:
    responses = all_responses()
    ids = torch.tensor([[*row, *[0] * (LONGEST - len(row))] for row in responses])
    for row, found in zip(responses, states_of(ids), strict=True):
        assert found[: len(row)].tolist() == [STATES.index(row[:t]) for t in range(len(row))]


@pytest.mark.slow
def test_the_page_is_what_the_code_does() -> None:
    assert (ROOT / "docs/objectives.md").read_text(encoding="utf-8") == page(), "run python -m tests.objectives"
