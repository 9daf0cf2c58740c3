"""Two ranks train as one process does: the same functions run here alone and in two processes, and are compared.

Models and roles are in float64, so that what remains is rounding: 1e-9 where sums are taken in another order.
"""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.testing import assert_close

from src.core.aggregation import constant_length, sequence_mean, token_mean
from src.core.correction import Truncated
from src.core.estimators import GAE, GreedyBaseline, LeaveOneOut, RunningMeanBaseline
from src.core.value_losses import ClippedSquaredError, SquaredError
from src.errors import RewardError
from src.models.roles import Roles
from src.rollout.kl_controller import AdaptiveKL
from src.rollout.scoring import Scorer
from src.rollout.shaping import IgnoreMissingEos, Normalize, ScoreShaping
from src.types import Experience
from src.utils import distributed as shared
from src.utils.launch import SummedGradients
from src.utils.nonfinite import FiniteGuard
from src.utils.seeding import generator
from tests.modules import test_reward, test_sft, test_trpo
from tests.ranks import WORLD, Ranks
from tests.rollout.test_dropping import FailsOn
from tests.tiny import (
    FOREIGN_WARNINGS,
    LORA,
    PROMPTS,
    Inject,
    Recorder,
    ScriptedReward,
    fit,
    make_maker,
    make_module,
    make_prompts,
    make_roles,
    ragged_experience,
    ragged_rollout,
    snapshot,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

AGGREGATIONS = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant_length": partial(constant_length, length=6),
}
close = partial(assert_close, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pair = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


def together() -> dict[str, Any]:
    """The Trainer's options for as many processes as there are."""
    count = shared.world_size()
    return {"devices": count, "strategy": SummedGradients()} if count > 1 else {"devices": 1}


def roles_at(base: str, lora: Any = LORA) -> Roles:
    return make_roles(base, lora, spread=0.1, dtype="float64")


class Gradients(Callback):
    """The gradients that every step of every optimizer uses."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda o, a, k: self.seen.append(self.of(o.param_groups[0]["params"])))

    def of(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


def assert_alike(alone: Any, both: list[Any]) -> None:
    """Both ranks say what one process says."""
    assert len(both) == WORLD
    for one in both:
        close(one, alone)
    assert_close(both[0], both[1], rtol=0, atol=0)


# What is learned from given experience


def learn(folder: Path, base: str, aggregation: str, lora: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Gradients of every step, logged means and final weights of one iteration on a ragged batch of 7 rows.

    Minibatches of 3, 3 and 1 rows: in the last one a rank has nothing to do.
    """
    roles = roles_at(base, lora)
    rollout = ragged_rollout(rows=7)
    with torch.no_grad():
        logprobs, values = roles.distribution(rollout, 1.0).logprobs(), roles.values(rollout)
    noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1), dtype=logprobs.dtype)
    experience = ragged_experience(rollout, logprobs + 0.2 * noise, values + 0.2 * noise)
    rows = ragged_rollout(rows=7, seed=4)
    text = {"ids": rows.response_ids, "mask": rows.response_mask}
    gradients = Gradients()
    module = make_module(
        roles, minibatch_size=3, micro_batch_size=2, entropy_coef=0.1, ptx_coef=0.3, batch_size=7,
        aggregation=AGGREGATIONS[aggregation],
        value_loss=ClippedSquaredError(5.0), **settings,  # none is clipped, which would leave no gradient
    )  # fmt: skip
    recorder, _ = fit(module, folder, iterations=1, callbacks=(Inject(experience, text), gradients), **together())
    weights = snapshot([*roles.policy_parameters(), *roles.critic_parameters()])
    return {"gradients": gradients.seen, "logged": recorder.by_step(), "weights": weights}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_of_two_ranks_are_those_of_one(
    ranks: Ranks, base: str, tmp_path: Path, aggregation: str, lora: Any
) -> None:
    """Checklist 48. Policy, entropy, language-model and value loss, with ragged rows and a rank without any."""
    arguments = tmp_path, base, aggregation, lora, {}
    alone = learn(*arguments)
    assert len(alone["gradients"]) == 12  # 2 epochs of 3 minibatches, 2 optimizers
    assert all(gradient.dtype == torch.float64 for step in alone["gradients"] for gradient in step)
    assert all(any(gradient.abs().max() > 1e-4 for gradient in step) for step in alone["gradients"])
    assert_alike(alone, ranks(learn, *arguments))


def test_the_early_stop_is_decided_by_all_ranks(ranks: Ranks, base: str, tmp_path: Path) -> None:
    """Checklist 48, 55. On the mean KL(old || new) of the whole minibatch: at the same step, on both ranks."""
    arguments = tmp_path, base, "token_mean", LORA, {"early_stop_kl": 0.05, "lr": 0.03}
    alone = learn(*arguments)
    assert alone["logged"][1]["policy/early_stop"] == 1
    assert 1 <= alone["logged"][1]["train/optimizer_steps"] <= 5
    assert_alike(alone, ranks(learn, *arguments))


def out_of_order(folder: Path, base: str, kind: str) -> dict[str, Any]:
    """A row whose loss is NaN, or memory that runs out once, on the rank that has the first row."""
    roles, guard = roles_at(base), FiniteGuard(9, str(folder / "nonfinite"))
    rollout = ragged_rollout(rows=8)
    with torch.no_grad():
        experience = ragged_experience(rollout, roles.distribution(rollout, 1.0).logprobs(), roles.values(rollout))
    module, failed = make_module(roles, minibatch_size=4, micro_batch_size=2, batch_size=8), []
    module.nonfinite, loss = guard, module.objective.loss

    def faulty(micro: Experience, weights: Tensor, averages: Any) -> Tensor:
        mine = "p0" in micro.rollout.prompts
        if mine and kind == "memory" and not failed:
            failed.append(len(micro))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(micro, weights, averages) * (torch.nan if mine and kind == "nan" else 1.0)

    module.objective.loss = faulty
    with warnings.catch_warnings(action="ignore"):
        recorder, _ = fit(module, folder, iterations=1, callbacks=(Inject(experience),), **together())
    weights = snapshot([*roles.policy_parameters(), *roles.critic_parameters()])
    return {"logged": recorder.by_step(), "weights": weights, "guard": guard.state_dict()}


@pytest.mark.parametrize("kind", ["nan", "memory"])
def test_a_fault_on_one_rank_is_met_by_both_alike(ranks: Ranks, base: str, tmp_path: Path, kind: str) -> None:
    """Checklist 48. A step that is left out is so on both; memory that runs out on one changes nothing on the other."""
    alone = out_of_order(tmp_path, base, kind)
    assert alone["logged"][1]["train/skipped_steps"] == (2 if kind == "nan" else 0)
    assert_alike(alone, ranks(out_of_order, tmp_path, base, kind))


def trust_region(folder: Path, base: str) -> dict[str, Any]:
    """A natural-gradient step of the policy on five rows, and steps of the critic."""
    roles = test_trpo.double_roles(base, critic=True)
    module = test_trpo.trpo(roles, test_trpo.REGION, value_loss=SquaredError())
    made = test_trpo.make_experience(roles, rows=5)
    recorder, _ = fit(module, folder, iterations=1, callbacks=(Inject(made),), **together())
    return {"logged": recorder.by_step(), "weights": snapshot(roles.policy_parameters())}


def test_a_natural_gradient_step_of_two_ranks_is_that_of_one(ranks: Ranks, base: str, tmp_path: Path) -> None:
    """Checklist 48. Gradient, products with the Fisher matrix and line search are over the rows of both."""
    alone = trust_region(tmp_path, base)
    assert alone["logged"][1]["policy/step_fraction"] > 0
    assert_alike(alone, ranks(trust_region, tmp_path, base))


# How experience is made


def experience(base: str, kind: str) -> dict[str, Any]:
    """Two batches of experience, the state that is left, and what was measured."""
    scorer = Scorer(timeout=None, drop_failed=kind == "dropped")
    prompts, reward = make_prompts(PROMPTS), ScriptedReward()
    estimator: Any = GAE(gamma=1.0, lam=0.95, critic_lam=0.95)
    if kind == "dropped":
        reward = FailsOn([1, 4, 5, 6, 7])  # every row of the second rank, and one of the first
    if kind == "raising":
        scorer = dataclasses.replace(scorer, drop_failed=True)
        reward = FailsOn([0, 1, 2, 3], ValueError("cannot"))  # every row of the first rank
    if kind == "groups":
        estimator, prompts = (
            LeaveOneOut(),
            dataclasses.replace(prompts, group_ids=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])),
        )
    if kind == "greedy":
        estimator = GreedyBaseline(gamma=1.0)
        prompts = dataclasses.replace(prompts, group_ids=torch.tensor([0] * 8))  # one prompt for two ranks
    if kind == "running":
        estimator = RunningMeanBaseline(gamma=1.0, baseline_decay=0.9)
    maker = make_maker(
        advantage=estimator, scorer=scorer, whiten_rewards=kind == "gae",
        shaping=ScoreShaping(Normalize(), score_clip=1.5, missing_eos=IgnoreMissingEos()),
        kl_controller=AdaptiveKL(0.1, 1.0, 100),
    )  # fmt: skip
    roles, made = roles_at(base), []
    for iteration in range(2):
        draws = generator(5, "sampling", 0, iteration)
        found, measures = maker.make(roles, reward, prompts, iteration, draws)
        made.append((numbers(found), measures))
    return {"texts": repr((found.rollout.prompts, found.rollout.responses)), "made": made, "state": maker.state_dict()}


def numbers(found: Experience) -> dict[str, Any]:
    """Every tensor of an experience by name."""
    fields = dataclasses.asdict(found)
    return {name: x for name, x in (fields | fields["rollout"]).items() if isinstance(x, Tensor)}


@pytest.mark.parametrize("kind", ["gae", "dropped", "raising", "groups", "greedy", "running"])
def test_experience_of_two_ranks_is_that_of_one(ranks: Ranks, base: str, kind: str) -> None:
    """Checklist 40, 48. The same tokens, and whitening, moments, baselines and the KL coefficient over both ranks."""
    alone, both = experience(base, kind), ranks(experience, base, kind)
    rows = len(alone["made"][0][0]["scores"])
    assert rows == {"dropped": 3, "raising": 4}.get(kind, 8)
    assert [one.pop("texts") for one in both] == [alone.pop("texts")] * WORLD
    assert_alike(alone, both)


def test_nothing_left_on_any_rank_is_said_by_all(ranks: Ranks, base: str) -> None:
    """Nobody waits for somebody who has given up."""
    sentence = "NaN where a number was due"
    assert all(sentence in said for said in [nothing_left(base), *ranks(nothing_left, base)])


def one_behind(folder: Path, base: str) -> dict[str, Any]:
    """What three iterations log and where they end, each batch sampled one update early."""
    roles = roles_at(base)
    module = make_module(roles, iterations=3, batch_size=7, minibatch_size=3)
    maker = make_maker(correction=Truncated(1.1))
    recorder, _ = fit(module, folder, maker=maker, iterations=3, lag=1, **together())
    return {"logged": recorder.by_step(), "weights": snapshot(roles.policy_parameters())}


def test_one_step_behind_two_ranks_learn_as_one(ranks: Ranks, base: str, tmp_path: Path) -> None:
    alone = one_behind(tmp_path, base)
    assert alone["logged"][3]["rollout/behavior_kl"] > 1e-6
    assert_alike(alone, ranks(one_behind, tmp_path, base))


def nothing_left(base: str) -> str:
    maker = make_maker(scorer=Scorer(timeout=None, drop_failed=True))
    reward = FailsOn(list(range(8)), ValueError("NaN where a number was due"))
    with pytest.raises(RewardError) as error:
        maker.make(roles_at(base), reward, make_prompts(PROMPTS), 0, generator(5, "sampling", 0, 0))
    return str(error.value)


# The supervised stages


def sft(folder: Path, base: str) -> dict[str, Any]:
    """Two steps on texts of several lengths, and the held-out nats."""
    module = test_sft.make(base, None, lr=0.1).double()
    logged = test_sft.run(module, folder, steps=2, **together()).by_step()
    test_sft.run(module, folder, "test", **together())
    return {"logged": logged, "weights": snapshot(list(module.net.parameters())), "nats": module.test_rows}


def reward_model(folder: Path) -> dict[str, Any]:
    """A step with every term of the loss, and what is measured on held-out pairs."""
    module = test_reward.make().double()
    module.margin_coef, module.center_coef = 0.5, 0.1
    module.make_optimizer = partial(torch.optim.SGD, lr=0.1)
    recorder = Recorder()
    data = test_reward.data(4)
    trainer = test_reward.trainer(folder, recorder, **together())
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    figures = {name: figure.value for name, figure in module.result()["reward_model"].items()}
    return {"logged": recorder.by_step(), "weights": snapshot(list(module.net.parameters())), "figures": figures}


def test_sft_of_two_ranks_is_that_of_one(ranks: Ranks, base: str, tmp_path: Path) -> None:
    """Checklist 48. The mean is over the tokens of the batch, though one rank has more of them than the other."""
    alone = sft(tmp_path, base)
    assert_alike(alone, ranks(sft, tmp_path, base))


def test_the_reward_stage_of_two_ranks_is_that_of_one(ranks: Ranks, tmp_path: Path) -> None:
    """Checklist 48. Four pairs, two for each rank; held-out figures too."""
    alone = reward_model(tmp_path)
    assert_alike(alone, ranks(reward_model, tmp_path))


# Sharing out


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_every_row_falls_to_one_rank(monkeypatch: pytest.MonkeyPatch, world: int, rows: int) -> None:
    """Blocks in order; pieces dealt out so that no rank goes without while there are rows enough."""
    monkeypatch.setattr(shared, "world_size", lambda: world)
    blocks, dealt = [], []
    for rank in range(world):
        monkeypatch.setattr(shared, "rank", lambda rank=rank: rank)
        blocks.append(shared.row_shard(rows).index.tolist())
        hand = list(shared.round_robin(torch.arange(rows).split(shared.per_rank_size(rows, 3))))
        dealt.append([piece for piece in hand if piece is not None])
    assert [row for block in blocks for row in block] == list(range(rows))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    assert sorted(row for hand in dealt for piece in hand for row in piece.tolist()) == list(range(rows))
    assert all(len(piece) <= 3 for hand in dealt for piece in hand)
    if rows % world == 0:
        assert all(dealt)


def gradients_of_three() -> list[Tensor | None]:
    """One parameter that both ranks use, one that the second uses, one that nobody does."""
    both, second, nobody = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    both.grad = torch.full((2, 2), 1.0 + shared.rank())
    if shared.rank() == 1:
        second.grad = torch.arange(4.0).view(2, 2)
    shared.sum_gradients([both, second, nobody])
    return [both.grad, second.grad, nobody.grad]


def test_gradients_are_summed_and_what_nobody_used_has_none(ranks: Ranks) -> None:
    for both, second, nobody in ranks(gradients_of_three):
        assert_close(both, torch.full((2, 2), 3.0))
        assert_close(second, torch.arange(4.0).view(2, 2))
        assert nobody is None


def agreed() -> Tensor:
    weight = nn.Parameter(torch.full((3,), float(shared.rank())))
    shared.broadcast_([weight])
    return weight.detach()


def test_all_ranks_start_from_the_first_ranks_weights(ranks: Ranks) -> None:
    assert [weight.tolist() for weight in ranks(agreed)] == [[0, 0, 0], [0, 0, 0]]
