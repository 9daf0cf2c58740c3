"""Whether the losses reach the parameters of their optimizers, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from src.models.checks import gradients
from src.models.roles import Roles
from src.models.weights import moved_by, restore, snapshot
from src.modules.objective import critic_objective
from src.modules.ppo import PPOModule
from src.modules.weighted_means import WeightedMeans
from src.types import Experience
from src.utils.check import Check

NOISE = 0.01  # of a moved weight


@contextmanager
def moved(roles: Roles) -> Iterator[None]:
    """Every trained weight a little away from where it starts; put back at the end.

    At the start an adapter's second matrix and the value head are 0, so half of the tensors have no gradient, and all
    values are equal.
    """
    parameters = [*roles.policy_parameters(), *roles.critic_parameters()]
    before = snapshot(parameters)
    try:
        with torch.no_grad():
            moved_by(parameters, NOISE, torch.Generator().manual_seed(0))
        yield
    finally:
        with torch.no_grad():
            restore(before, parameters)


def role_gradients(module: PPOModule, experience: Experience) -> Iterator[Check]:
    """The check of each role's gradient, from a backward pass of its own loss."""
    own = {"policy": module.roles.policy_parameters(), "critic": module.roles.critic_parameters()}
    with moved(module.roles):
        for role in roles_that_learn(module):
            module.zero_grad()
            backward(module, role, experience)
            yield gradients(module.roles, role, own[role])
    module.zero_grad()


def roles_that_learn(module: PPOModule) -> list[str]:
    """Those with an optimizer."""
    return ["policy"] if module.value_loss is None else ["policy", "critic"]


def backward(module: PPOModule, role: str, experience: Experience) -> None:
    """Add the gradient of a role's loss in the first minibatch, with random advantages or returns.

    So it is not 0 where all responses score the same.
    """
    mask, temperature = experience.mask, module.settings.temperature
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)).to(experience.old_logprobs) * mask
    weights, means = module.aggregation(mask), WeightedMeans()
    if role == "policy":
        with torch.no_grad():
            now = module.roles.distribution(experience.rollout, temperature).logprobs()
        module.objective.remember_old_policy()
        micro = replace(experience, old_logprobs=now, advantages=noise)
        loss = module.objective.loss(micro, weights, means)
    else:
        assert module.value_loss is not None
        with torch.no_grad():
            values = module.roles.values(experience.rollout)
        micro = replace(experience, old_values=values, returns=values + noise)
        loss = critic_objective(module.roles, module.value_loss, micro, weights, means)
    if loss.requires_grad:
        loss.backward()
