"""Every estimator with every policy loss, as the configuration makes them, through a real fit."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_constant_schedule

from src.config.compose import compose
from src.config.files import CONF
from src.core.kl import SampledKL, k1
from src.models.roles import Roles
from src.modules.ppo import PPOModule
from src.modules.settings import PPOSettings
from src.modules.trpo import TRPOModule
from src.rollout.kl_controller import FixedKL
from src.rollout.sampling import Sampler
from src.stages.objects import instantiate
from tests.tiny import FOREIGN_WARNINGS, Recorder, fit, make_maker, make_roles, same_bits, snapshot, tokenizer, write_lm

pytestmark = [*FOREIGN_WARNINGS]

ESTIMATORS = sorted(path.stem for path in (CONF / "advantage").glob("*.yaml"))
LOSSES = sorted(path.stem for path in (CONF / "policy_loss").glob("*.yaml"))
PAIRS = pytest.mark.parametrize(("advantage", "policy_loss"), [(a, p) for a in ESTIMATORS for p in LOSSES])
PARTS = ("policy_loss", "old_kl", "old_kl_controller", "aggregation")
SETTINGS = {
    "batch_size": 32, "epochs": 2, "minibatch_size": 16, "micro_batch_size": 16, "max_grad_norm": 1.0,
    "entropy_coef": 0.0, "ptx_coef": 0.0, "early_stop_kl": None, "critic_warmup": 0, "temperature": 1.0,
}  # fmt: skip


class FirstToken:
    """A bandit with as many arms as there are words: the score of a response hangs on its first word alone."""

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        words = [(response.split() or ["."])[0] for response in responses]
        vocabulary = tokenizer()
        return [number / len(vocabulary) for number in vocabulary.convert_tokens_to_ids(words)]


@cache
def choice(group: str, option: str, key: str = "") -> Any:
    """The block `ppo` as one option leaves it, or the object that this says under a key of it."""
    ppo: Any = compose([f"{group}={option}", "rollout.samples_per_prompt=2"]).ppo
    return instantiate(getattr(ppo, key), f"ppo.{key}") if key else ppo


def make(roles: Roles, policy_loss: str, seed: int, critic: bool) -> PPOModule:
    """The module as `policy_loss` asks for it."""
    ppo = choice("policy_loss", policy_loss)
    adam = partial(torch.optim.Adam, lr=0.01)
    settings = SETTINGS | {"epochs": min(SETTINGS["epochs"], ppo.epochs)}
    if ppo.trust_region is not None:  # the whole batch at once is twice as fast, see TRPOModule
        settings["micro_batch_size"] = SETTINGS["batch_size"]
    parts: dict[str, Any] = {
        "settings": PPOSettings(**settings),
        **{name: instantiate(getattr(ppo, name), f"ppo.{name}") for name in PARTS},
        "reference_kl": SampledKL(k1),
        "value_loss": choice("value_loss", "mse", "value_loss") if critic else None,
        "policy_optimizer": adam,
        "critic_optimizer": adam,
        "lr_schedule": get_constant_schedule,
        "reward": FirstToken(),
        "seed": seed,
    }
    if ppo.trust_region is not None:
        return TRPOModule(roles, trust_region=instantiate(ppo.trust_region, "ppo.trust_region"), **parts)
    return PPOModule(roles, **parts)


def train(
    base: str, folder: Path, advantage: str, policy_loss: str, seed: int, iterations: int
) -> tuple[Recorder, Any]:
    """A fit of the pair; the recorder and the roles before and after."""
    estimator = instantiate(choice("advantage", advantage).advantage, "ppo.advantage")
    roles = make_roles(base, critic=estimator.needs_values)
    before = snapshot(roles.policy_parameters())
    module = make(roles, policy_loss, seed, estimator.needs_values)
    maker = make_maker(
        advantage=estimator,
        sampler=Sampler(max_new_tokens=2, temperature=1.0),
        kl_controller=FixedKL(0.01),
        batch_size=32,
    )
    recorder, _ = fit(module, folder, maker=maker, samples_per_prompt=4, iterations=iterations, seed=seed)
    return recorder, (before, roles)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


@PAIRS
def test_every_pair_takes_a_step(advantage: str, policy_loss: str, base: str, tmp_path: Path) -> None:
    """The policy moves; a critic exists exactly where the estimator reads values."""
    recorder, (before, roles) = train(base, tmp_path, advantage, policy_loss, seed=1, iterations=1)
    assert not same_bits(before, roles.policy_parameters())
    row = recorder.by_step()[1]
    needs_values = choice("advantage", advantage, "advantage").needs_values
    assert ("critic/loss" in row) == needs_values == bool(roles.critic_parameters())
    assert all(torch.isfinite(torch.tensor(value)) for value in row.values())


@pytest.mark.slow
@PAIRS
def test_every_pair_learns_a_bandit(advantage: str, policy_loss: str, base: str, tmp_path: Path) -> None:
    """The mean score rises over three seeds, and in each of them."""
    # TRPO takes one step a batch, inside a small trust region; the others take two epochs of minibatches.
    iterations = 36 if policy_loss == "trpo" else 12
    rises = []
    for seed in (1, 2, 3):
        recorder, _ = train(base, tmp_path, advantage, policy_loss, seed, iterations)
        scores = [recorder.by_step()[i]["rollout/score"] for i in range(1, iterations + 1)]
        rises.append(sum(scores[-3:]) / 3 - sum(scores[:3]) / 3)
    print(advantage, policy_loss, *(f"{rise:.3f}" for rise in rises))
    assert min(rises) > 0
    assert sum(rises) / 3 > 0.05
