"""The trust-region step against a Fisher matrix that is written down and inverted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.core.aggregation import constant_length, sequence_mean, token_mean
from src.core.policy_losses import Surrogate
from src.errors import SettingError
from src.models.roles import Roles
from src.models.settings import LoraSettings
from src.modules.trpo import TRPOModule, TrustRegion
from src.types import Experience
from tests.tiny import (
    FOREIGN_WARNINGS,
    Inject,
    fit,
    make_maker,
    make_module,
    make_roles,
    plain_model,
    ragged_experience,
    ragged_rollout,
    same_bits,
    snapshot,
    write_lm,
)

pytestmark = [*FOREIGN_WARNINGS]

NARROW = LoraSettings(rank=1, alpha=2, dropout=0.0, targets=["c_attn"])
REGION = TrustRegion(max_kl=1e-3, damping=0.1, cg_iterations=200, backtracks=10)
MEANS = pytest.mark.parametrize("aggregation", [token_mean, sequence_mean, partial(constant_length, length=50)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


def double_roles(base: str, critic: bool = False) -> Roles:
    """Two layers with a rank-1 adapter each, 128 numbers, moved off the start, where the Fisher matrix is singular."""
    return make_roles(base, NARROW, spread=0.3, critic=critic, dtype="float64").double()


def make_experience(roles: Roles, rows: int = 4) -> Experience:
    rollout = ragged_rollout(rows=rows, response=4)
    with torch.no_grad():
        old = roles.distribution(rollout, 1.0).logprobs()
    return ragged_experience(rollout, old, torch.zeros_like(old))


def trpo(roles: Roles, region: TrustRegion, **changes: Any) -> TRPOModule:
    """`make_module`'s parts in a TRPO module."""
    plain = make_module(roles, policy_loss=Surrogate(), epochs=1, batch_size=4, minibatch_size=4)
    parts: dict[str, Any] = {
        "settings": plain.settings, "policy_loss": Surrogate(), "old_kl": plain.objective.old_kl,
        "old_kl_controller": plain.objective.old_kl_controller, "value_loss": None, "aggregation": token_mean,
        "policy_optimizer": plain.optimizer_factories["policy"], "lr_schedule": plain.lr_schedule,
        "critic_optimizer": plain.optimizer_factories["critic"], "reward": plain.reward,
        "reference_kl": make_maker().reference_kl.estimator, "seed": 3,
    }  # fmt: skip
    return TRPOModule(roles, trust_region=region, **(parts | changes))


def vector(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def dense_fisher_and_gradient(
    roles: Roles, experience: Experience, weights: Tensor, parameters: list[nn.Parameter], model: Any
) -> tuple[Tensor, Tensor]:
    """F = mean_t E_v[(grad log p_v)(grad log p_v)^T] and g = -sum_t w_t A_t grad log p(a_t), token by token."""
    size = sum(p.numel() for p in parameters)
    fisher, gradient = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    rollout = experience.rollout
    for row in range(len(experience)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        for t, token in enumerate(response):
            logp = F.log_softmax(logits[len(prompt) + t - 1], 0)
            basis = torch.eye(len(logp), dtype=torch.float64)
            rows = torch.autograd.grad(logp, parameters, basis, is_grads_batched=True, retain_graph=True)
            jacobian = torch.cat([r.reshape(len(logp), -1) for r in rows], dim=1)
            fisher += jacobian.T @ (logp.exp().detach().unsqueeze(1) * jacobian) / experience.mask.sum()
            gradient -= weights[row, t].item() * experience.advantages[row, t] * jacobian[token]
    return fisher, gradient


@MEANS
def test_the_step_is_the_damped_natural_gradient_solved_densely(base: str, aggregation: Any, tmp_path: Path) -> None:
    """x = (F + damping I)^-1 (-g) by an LU solve, times sqrt(2 max_kl / x^T (F + damping I) x).

    A correction for another policy that sampled weighs g, and not F.
    """
    roles = double_roles(base)
    experience, before = make_experience(roles), snapshot(roles.policy_parameters())
    correction = torch.rand(experience.mask.shape, generator=torch.Generator().manual_seed(6)).double() + 0.5
    experience = replace(experience, correction=correction * experience.mask)
    model = plain_model(roles, "policy")
    adapters = [p for n, p in model.named_parameters() if ".policy." in n]
    fisher, gradient = dense_fisher_and_gradient(
        roles, experience, aggregation(experience.mask).double() * correction, adapters, model
    )
    damped = fisher + REGION.damping * torch.eye(len(fisher), dtype=torch.float64)
    x = torch.linalg.solve(damped, -gradient)
    expected = (2 * REGION.max_kl / (x @ damped @ x)).sqrt() * x

    module = trpo(roles, REGION, aggregation=aggregation)
    recorder, _ = fit(module, tmp_path, iterations=1, callbacks=(Inject(experience),))
    step = vector(roles.policy_parameters()) - vector(before)
    row = recorder.by_step()[1]
    assert row["policy/step_fraction"] == 1.0
    assert len(step) == 128
    assert (step - expected).norm() / expected.norm() < 1e-4
    assert row["policy/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)


def exact_kl(old: list[Tensor], new: list[Tensor], mask: Tensor) -> float:
    """The mean of KL(old || new) over all tokens, from whole distributions."""
    found = []
    for row in range(len(mask)):
        for t in range(int(mask[row].sum())):
            p, q = (torch.distributions.Categorical(logits=x[row][t]) for x in (old, new))
            found.append(torch.distributions.kl_divergence(p, q).item())
    return sum(found) / len(found)


def all_logits(model: Any, experience: Experience) -> list[Tensor]:
    """The logits before each response token, row by row, without padding."""
    rollout, found = experience.rollout, []
    for row in range(len(experience)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :])
    return found


@MEANS
@pytest.mark.parametrize("max_kl", [1e-4, 1e-2, 0.3])
def test_the_measured_kl_obeys_its_bound(base: str, max_kl: float, aggregation: Any, tmp_path: Path) -> None:
    """KL(old || new) over the whole vocabulary, measured from outside; without damping the bound is nearly used up.

    The bound is on nats per token, whatever the aggregation of the loss.
    """
    roles = double_roles(base)
    experience = make_experience(roles)
    before = all_logits(plain_model(roles, "policy"), experience)
    region = TrustRegion(max_kl=max_kl, damping=1e-4, cg_iterations=60, backtracks=10)
    module = trpo(roles, region, aggregation=aggregation)
    recorder, _ = fit(module, tmp_path, iterations=1, callbacks=(Inject(experience),))
    after = all_logits(plain_model(roles, "policy"), experience)
    kl = exact_kl(before, after, experience.mask)
    row = recorder.by_step()[1]
    assert 0 < kl <= max_kl
    assert row["policy/step_kl"] == pytest.approx(kl, rel=1e-4)
    if row["policy/step_fraction"] == 1.0:
        assert kl > 0.5 * max_kl
    assert row["policy/step_gain"] > 0


def test_a_step_that_gains_nothing_is_not_taken(base: str, tmp_path: Path) -> None:
    """Advantages of 0 have no gradient: no direction, no step, no NaN."""
    roles = double_roles(base)
    experience = make_experience(roles)
    before = snapshot(roles.policy_parameters())
    still = replace(experience, advantages=torch.zeros_like(experience.advantages))
    recorder, _ = fit(trpo(roles, REGION), tmp_path, iterations=1, callbacks=(Inject(still),))
    assert same_bits(before, roles.policy_parameters())
    assert recorder.by_step()[1]["policy/step_fraction"] == 0


def test_splitting_changes_no_step(base: str, tmp_path: Path) -> None:
    """Checklist 47. Micro-batches of one row and of all rows."""
    steps = []
    for size in (1, 4):
        roles = double_roles(base)
        experience, before = make_experience(roles), snapshot(roles.policy_parameters())
        module = trpo(roles, REGION)
        module.settings = replace(module.settings, micro_batch_size=size)
        fit(module, tmp_path, iterations=1, callbacks=(Inject(experience),))
        steps.append(vector(roles.policy_parameters()) - vector(before))
    assert (steps[0] - steps[1]).norm() / steps[0].norm() < 1e-5


def test_warm_up_leaves_the_policy_alone(base: str, tmp_path: Path) -> None:
    """Checklist 60. Only the critic learns, by its optimizer."""
    roles = make_roles(base)
    policy, critic = snapshot(roles.policy_parameters()), snapshot(roles.critic_parameters())
    plain = make_module(roles, epochs=1, critic_warmup=1)
    module = trpo(roles, REGION, settings=plain.settings, value_loss=plain.value_loss)
    fit(module, tmp_path, maker=make_maker(), iterations=1)
    assert same_bits(policy, roles.policy_parameters())
    assert not same_bits(critic, roles.critic_parameters())


@pytest.mark.parametrize(
    ("name", "value"), [("max_kl", 0.0), ("damping", -0.1), ("cg_iterations", 0), ("backtracks", 0)]
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingError) as error:
        replace(REGION, **{name: value})
    assert error.value.name == name
