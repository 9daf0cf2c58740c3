"""The gradients of all estimators on the same rollouts: how they are made and what is said of them."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from src.core.aggregation import constant_length
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
from src.models.roles import Roles
from src.rollout.kl_controller import FixedKL
from src.rollout.minibatches import micro_batches
from src.types import Experience, Prompts
from studies.estimators.gradients import EveryEstimator, compare, policy_gradients
from tests.tiny import (
    FOREIGN_WARNINGS,
    LORA,
    ScriptedReward,
    make_maker,
    make_prompts,
    make_roles,
    plain_model,
    rows_of,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

TEXTS = ["the film", "a", "we liked the plot", "they"]


def estimators(gamma: float = 0.9) -> dict[str, Estimator]:
    """Every kind there is."""
    return {
        "total_return": TotalReturn(gamma), "reward_to_go": RewardToGo(gamma), "batch": BatchMeanBaseline(gamma),
        "running": RunningMeanBaseline(gamma, 0.8), "whitened": NormalizedReturn(gamma),
        "value": ValueBaseline(gamma, 1.0), "td": TDError(gamma, 0.0), "gae": GAE(gamma, lam=0.7, critic_lam=0.7),
        "rloo": LeaveOneOut(), "grpo": GroupRelative(True), "remax": GreedyBaseline(gamma),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- what is said of them


def test_the_figures_are_those_of_numpy() -> None:
    """Each batch is held against the mean of the others' true estimates, never against a mean that holds itself."""
    draws = np.random.default_rng(3)
    truth = draws.normal(size=(6, 9)) + 0.5
    gradients = {"truth": truth, "small": 0.1 * truth, "other": draws.normal(size=(6, 9)) - 0.7}
    found = compare({name: torch.tensor(g) for name, g in gradients.items()}, "truth")
    assert list(found) == list(gradients)
    for name, g in gradients.items():
        variance = np.trace(np.cov(g, rowvar=False))
        pairs = [row @ other for i, row in enumerate(g) for j, other in enumerate(g) if i != j]
        norm = np.sqrt(np.mean(pairs))  # the product of two independent estimates has |E g|^2 as its mean
        others = [np.delete(truth, n, axis=0).mean(0) for n in range(6)]
        cosines = [row @ o / np.linalg.norm(row) / np.linalg.norm(o) for row, o in zip(g, others, strict=True)]
        expected = {
            "variance": variance, "norm": norm, "noise": variance / norm**2, "cosine": statistics.fmean(cosines)
        }  # fmt: skip
        assert {key: figure.value for key, figure in found[name].items()} == pytest.approx(expected, rel=1e-9)
        assert all(figure.n == 6 for figure in found[name].values())
        for key, scattered in (("variance", True), ("cosine", True), ("norm", False), ("noise", False)):
            interval = found[name][key].interval
            assert (interval is not None) == scattered
            assert interval is None or interval[0] < expected[key] < interval[1]
    assert found["small"]["noise"].value == pytest.approx(found["truth"]["noise"].value)
    with_itself = [row @ truth.mean(0) / np.linalg.norm(row) / np.linalg.norm(truth.mean(0)) for row in truth]
    assert found["truth"]["cosine"].value < statistics.fmean(with_itself) - 0.05


def test_a_gradient_lost_in_its_noise_has_norm_0() -> None:
    """Two batches that point against each other: the product of two estimates is negative."""
    gradients = torch.tensor([[1.0, 0.0], [-0.9, 0.1], [0.0, -0.1]])
    found = compare({"truth": gradients}, "truth")["truth"]
    assert (found["norm"].value, found["noise"].value) == (0.0, math.inf)


# ---------------------------------------------------------------------------------------------------- how they are made


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    return make_roles(write_lm(tmp_path_factory.mktemp("base")), LORA, spread=0.1)


def grouped_prompts() -> Prompts:
    """Two samples of each prompt."""
    prompts = make_prompts([text for text in TEXTS for _ in range(2)])
    return Prompts(**{**prompts.__dict__, "group_ids": prompts.group_ids // 2})


def make(roles: Roles, every: EveryEstimator, seed: int = 2, **changes: Any) -> Experience:
    maker = make_maker(advantage=every, whiten_advantages=False, **changes)
    draws = torch.Generator().manual_seed(seed)
    return maker.make(roles, ScriptedReward(), grouped_prompts(), 0, draws)[0]


def ladder_gradients(roles: Roles, experience: Experience, credits: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the callback asks for them: micro-batches of three rows, sums over each response."""
    weights = constant_length(experience.mask, 6)
    pieces = (
        (roles.distribution(micro.rollout, 1.0).logprobs(), weights[index, : micro.mask.shape[1]], index)
        for index, micro in micro_batches(experience, 3)
    )
    return policy_gradients(pieces, credits, roles.policy_parameters())


def plain_gradient(roles: Roles, experience: Experience, phi: Tensor) -> Tensor:
    """Of sum Phi log pi / (rows * 6), row by row through peft alone, in the order of the policy's parameters."""
    model, rollout = plain_model(roles, "policy"), experience.rollout
    total = torch.zeros(())
    for row in range(len(experience)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        logs = torch.log_softmax(model(input_ids=torch.tensor([prompt + response])).logits[0], 1)
        for t, token in enumerate(response):
            total = total + phi[row, t] * logs[len(prompt) + t - 1, token] / (8 * 6)
    total.backward()
    names = {id(p): name for name, p in roles.peft.named_parameters()}
    theirs = dict(model.named_parameters())
    return torch.cat([theirs[names[id(p)]].grad.flatten() for p in roles.policy_parameters()])


def test_each_gradient_is_that_of_a_plain_loss(roles: Roles) -> None:
    """Checklist 1, 2, 47. For every estimator, from one pass; and nothing is left behind in the parameters."""
    every = EveryEstimator(RewardToGo(1.0), estimators())
    experience = make(roles, every)
    found = ladder_gradients(roles, experience, every.latest)
    assert set(found) == set(estimators())
    for name, gradient in found.items():
        expected = plain_gradient(roles, experience, every.latest[name])
        assert expected.norm() > 1e-3, name
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert all(p.grad is None for p in roles.parameters())


def test_a_terminal_reward_without_discount_makes_past_rewards_free(roles: Roles) -> None:
    """Checklist 34. R(tau) and G_t are one number then; with a KL in the rewards, or a discount, they are two."""
    same, apart = {}, {}
    for gamma, coef, found in ((1.0, 0.0, same), (1.0, 0.7, apart), (0.5, 0.0, apart)):
        every = EveryEstimator(RewardToGo(1.0), estimators(gamma))
        experience = make(roles, every, kl_controller=FixedKL(coef))
        found[gamma, coef] = ladder_gradients(roles, experience, every.latest)
    for gradients in same.values():
        assert gradients["total_return"].norm() > 1e-3
        assert torch.equal(gradients["total_return"], gradients["reward_to_go"])
    for gradients in apart.values():
        difference = gradients["total_return"] - gradients["reward_to_go"]
        assert difference.norm() > 0.01 * gradients["total_return"].norm()


def test_every_phi_of_a_batch_is_kept_and_one_is_used(roles: Roles) -> None:
    """Checklist 34, 42. Those of the main estimator go into the experience, with its targets for the critic."""
    every = EveryEstimator(GAE(gamma=0.9, lam=0.7, critic_lam=0.6), estimators())
    experience = make(roles, every)
    assert set(every.latest) == set(estimators())
    mask = experience.mask
    rewards, values = (rows_of(x.double(), mask) for x in (experience.rewards, experience.old_values))
    groups = experience.rollout.group_ids.tolist()
    for row, (r, v) in enumerate(zip(rewards, values, strict=True)):
        count = range(len(r))
        to_go = [sum(0.9 ** (u - t) * r[u] for u in count[t:]) for t in count]
        delta = [r[t] + 0.9 * ([*v, 0.0])[t + 1] - v[t] for t in count]
        (twin,) = (i for i in range(8) if groups[i] == groups[row] and i != row)
        expected = {
            "total_return": [to_go[0]] * len(r),
            "reward_to_go": to_go,
            "value": [g - b for g, b in zip(to_go, v, strict=True)],
            "td": delta,
            "gae": [sum((0.9 * 0.7) ** (u - t) * delta[u] for u in count[t:]) for t in count],
            "rloo": [sum(r) - sum(rewards[twin])] * len(r),
            "running": to_go,  # nothing was seen before
        }
        for name, phi in expected.items():
            assert every.latest[name][row][mask[row]].tolist() == pytest.approx(phi, abs=1e-5), name
        target = [sum((0.9 * 0.6) ** (u - t) * delta[u] for u in count[t:]) + v[t] for t in count]
        assert experience.returns[row][mask[row]].tolist() == pytest.approx(target, abs=1e-5)
    assert torch.equal(experience.advantages, every.latest["gae"])
    assert all(not phi[~mask].any() for phi in every.latest.values())


def test_estimators_with_a_memory_remember_each_batch_once(roles: Roles) -> None:
    """Checklist 61. The second batch is compared with the mean of the first; the memory survives a checkpoint."""
    every = EveryEstimator(RewardToGo(0.9), estimators())
    first = make(roles, every)
    past = torch.cat([g[m] for g, m in zip(every.latest["reward_to_go"], first.mask, strict=True)]).mean()
    restored = EveryEstimator(RewardToGo(0.9), estimators())
    restored.load_state_dict(every.state_dict())
    for again in (every, restored):
        second = make(roles, again, seed=7)
        expected = (again.latest["reward_to_go"] - past) * second.mask
        assert past.abs() > 1e-3
        torch.testing.assert_close(again.latest["running"], expected, atol=1e-6, rtol=0)


def test_the_main_estimator_has_a_memory_too(roles: Roles) -> None:
    """Checklist 61. Used as the main one, a running mean is what it is on its own."""
    every, alone = EveryEstimator(RunningMeanBaseline(0.9, 0.8), {}), RunningMeanBaseline(0.9, 0.8)
    for seed in (2, 7):
        together, expected = make(roles, every, seed=seed), make(roles, alone, seed=seed)
    torch.testing.assert_close(together.advantages, expected.advantages)
