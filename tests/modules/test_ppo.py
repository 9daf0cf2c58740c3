"""PPO through a real Lightning fit: what moves, what must not, and by exactly how much."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from src.callbacks.rollout import RolloutCallback
from src.config.compose import compose
from src.core.policy_losses import ClippedSurrogate, Surrogate
from src.core.value_losses import SquaredError
from src.errors import ConfigError, SettingError
from src.models.roles import Roles
from src.models.settings import LoraSettings
from src.modules.ppo import PPOModule
from src.rewards.learned import LearnedReward
from src.rollout.kl_controller import DoublingKL, FixedKL
from src.stages.ppo import PPOStage, experience_maker, settings_of
from src.types import Experience
from tests.tiny import (
    FAST_CPU,
    FOREIGN_WARNINGS,
    LORA,
    PAD,
    Inject,
    Recorder,
    ScriptedReward,
    TinyCorpus,
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
    write_reward_model,
)

pytestmark = [*FOREIGN_WARNINGS]

ON_OFF = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
KINDS = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
DROPOUT = {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"), **DROPOUT)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_reward_model(tmp_path_factory.mktemp("reward"), **DROPOUT)


class Spy(ClippedSurrogate):
    """The clipped surrogate; keeps the largest log-ratio of every call."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        self.__dict__.setdefault("moved", []).append((logprobs - old_logprobs)[mask].abs().max().item())
        self.__dict__.setdefault("advantages", []).append(advantages)
        return super().__call__(logprobs, old_logprobs, advantages, mask)


class Watch(Callback):
    """Notes every module that computes in training mode, from forward hooks, and every optimizer step."""

    def __init__(self) -> None:
        self.training: set[str] = set()
        self.forwards = self.looks = 0
        self.lrs: list[list[float]] = [[], []]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for name, module in pl_module.named_modules():
            if name and not isinstance(module, GradientCheckpointingLayer):
                module.register_forward_pre_hook(partial(self._note, name))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer, lrs in zip(trainer.optimizers, self.lrs, strict=True):
            optimizer.register_step_pre_hook(lambda o, a, k, lrs=lrs: lrs.append(o.param_groups[0]["lr"]))

    def _note(self, name: str, module: nn.Module, args: Any) -> None:
        self.forwards += 1
        if module.training:
            self.training.add(name)

    def _look(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.looks += 1
        inside = [("roles", pl_module.roles)]
        if isinstance(pl_module.reward, LearnedReward):
            inside.append(("reward", pl_module.reward.model))
        self.training |= {f"{root}.{n}" for root, top in inside for n, m in top.named_modules() if m.training}

    on_train_batch_start = on_train_batch_end = on_before_optimizer_step = on_train_end = _look


@dataclass
class Run:
    """One fit and what was seen of it."""

    roles: Roles
    reward: LearnedReward
    spy: Spy
    watch: Watch
    recorder: Recorder
    trainer: Any
    frozen: dict[str, Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module", params=[(LORA, False), (LORA, True), (None, False), (None, True)],
                ids=["lora", "lora-checkpointing", "full", "full-checkpointing"])  # fmt: skip
def run(request: pytest.FixtureRequest, base: str, reward_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two iterations of two epochs with dropout in every configuration there is."""
    lora, checkpointing = request.param
    lora = lora and replace(lora, dropout=0.4)
    roles = make_roles(base, lora, gradient_checkpointing=checkpointing)
    reward, spy, watch = LearnedReward(reward_folder, 4), Spy(0.2, 0.2), Watch()
    module = make_module(roles, reward=reward, policy_loss=spy, lr=0.03, critic_lr=0.02)
    mine = {id(p) for p in [*roles.policy_parameters(), *roles.critic_parameters()]}
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if id(p) not in mine}
    recorder, trainer = fit(module, tmp_path_factory.mktemp("run"), maker=make_maker(), callbacks=(watch,))
    return Run(roles, reward, spy, watch, recorder, trainer, frozen)


def test_the_first_minibatch_has_ratio_one(run: Run) -> None:
    """Checklist 5, 6, 58. In every iteration; later minibatches have moved, so the comparison is not idle.

    Eight rows in minibatches of four and micro-batches of three: four forward passes an epoch, two of them before
    the first step.
    """
    moved = run.spy.moved
    assert len(moved) == 2 * 2 * 4
    for iteration in (0, 1):
        first, later = moved[8 * iteration : 8 * iteration + 2], moved[8 * iteration + 2 : 8 * iteration + 8]
        assert max(first) < 1e-5
        assert max(later) > 1e-3


def test_everything_computes_in_eval_mode(run: Run) -> None:
    """Checklist 6, 59. Seen from forward hooks of every module, and from callbacks around every step."""
    assert run.watch.forwards > 100
    assert run.watch.looks >= 2 * 2 + 2 * 8
    assert run.watch.training == set()


def test_the_kl_to_the_reference_starts_at_exactly_zero(run: Run) -> None:
    """Checklist 33."""
    assert run.recorder.by_step()[1]["rollout/kl"] == 0
    assert run.recorder.by_step()[2]["rollout/kl"] != 0


def test_frozen_tensors_keep_every_bit_and_have_no_gradient(run: Run) -> None:
    """Checklist 59. Base, reference and reward model; the optimizers hold nothing of them."""
    module = run.trainer.lightning_module
    now = dict(module.named_parameters())
    assert any(name.startswith("reward.") for name in run.frozen)
    assert sum(name.startswith("roles.") for name in run.frozen) >= 20
    for name, before in run.frozen.items():
        if "models.critic.lm_head" in name:
            continue
        assert torch.equal(now[name], before), name
        assert now[name].grad is None, name
    frozen = {id(now[name]) for name in run.frozen}
    for optimizer in run.trainer.optimizers:
        assert not frozen & {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert len(optimizer.state) == len(optimizer.param_groups[0]["params"])


def test_global_step_counts_both_optimizers_and_rows_are_iterations(run: Run) -> None:
    """Checklist 64. Two iterations, two epochs, two minibatches, two optimizers."""
    assert run.trainer.global_step == 2 * 2 * 2 * 2
    table = run.recorder.by_step()
    assert sorted(table) == [1, 2]
    assert [table[i]["train/iterations"] for i in (1, 2)] == [1, 2]
    assert [table[i]["train/episodes"] for i in (1, 2)] == [8, 16]
    assert [table[i]["train/optimizer_steps"] for i in (1, 2)] == [4, 4]


def test_the_learning_rates_fall_linearly_over_the_iterations(run: Run) -> None:
    """Checklist 49, 51. As each optimizer saw it at each of its steps: the peak, then half of it; 0 after the last."""
    assert run.watch.lrs[0] == pytest.approx([0.03] * 4 + [0.015] * 4)
    assert run.watch.lrs[1] == pytest.approx([0.02] * 4 + [0.01] * 4)
    assert [optimizer.param_groups[0]["lr"] for optimizer in run.trainer.optimizers] == [0, 0]


def test_the_logged_learning_rate_is_the_one_that_was_used(run: Run) -> None:
    """Checklist 51."""
    table = run.recorder.by_step()
    assert [table[i]["policy/lr"] for i in (1, 2)] == pytest.approx([0.03, 0.015])
    assert [table[i]["critic/lr"] for i in (1, 2)] == pytest.approx([0.02, 0.01])


def test_advantages_are_whitened_once_per_batch_and_carry_no_gradient(run: Run) -> None:
    """Checklist 42. Over all micro-batches of an epoch they have mean 0 and variance 1; over one they do not."""
    epoch = run.spy.advantages[:4]
    assert not any(a.requires_grad for a in run.spy.advantages)
    counted = torch.cat([a[a != 0] for a in epoch])
    assert counted.mean().item() == pytest.approx(0, abs=1e-5)
    assert counted.var().item() == pytest.approx(1, abs=1e-3)
    assert epoch[0][epoch[0] != 0].mean().abs() > 1e-3


@KINDS
@ON_OFF
def test_without_a_learning_rate_nothing_moves_in_any_epoch(
    base: str, lora: LoraSettings | None, checkpointing: bool, tmp_path: Path
) -> None:
    """Checklist 4, 6. Ratio 1, KL(old || new) 0, clip fractions 0, in every minibatch of every epoch."""
    lora = lora and replace(lora, dropout=0.4)
    roles = make_roles(base, lora, gradient_checkpointing=checkpointing)
    before, spy = snapshot(list(roles.parameters())), Spy(1e-4, 1e-4)
    module = make_module(roles, lr=0.0, critic_lr=0.0, epochs=3, policy_loss=spy)
    recorder, _ = fit(module, tmp_path, maker=make_maker())
    assert len(spy.moved) == 2 * 3 * 4
    assert max(spy.moved) < 1e-5
    for row in recorder.by_step().values():
        assert row["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert abs(row["policy/old_kl"]) < 1e-9
        assert row["policy/clip_fraction"] == 0
        assert row["critic/clip_fraction"] == 0
        assert row["rollout/kl"] == 0
    assert same_bits(before, list(roles.parameters()))


# One minibatch, worked out row by row


def double_roles(base: str, lora: LoraSettings | None, checkpointing: bool = False) -> Roles:
    roles = make_roles(base, lora, spread=0.1, dtype="float64", gradient_checkpointing=checkpointing).double()
    return roles


@pytest.fixture(scope="module")
def experience(base: str) -> Experience:
    """Eight ragged rows whose old logprobs and values lie off the current ones, so that clipping happens."""
    roles, rollout = double_roles(base, LORA), ragged_rollout(rows=8)
    noise = torch.Generator().manual_seed(6)
    with torch.no_grad():
        old = roles.distribution(rollout, 0.8).logprobs()
        values = roles.values(rollout)
    jitter = [0.3 * torch.randn(old.shape, generator=noise).to(old) for _ in range(2)]
    return ragged_experience(rollout, old + jitter[0], values + jitter[1])


TEXT_ROWS = [[4, 5, 6, 7, 8, 1], [9, 1], [10, 11, 12, 1], [13, 14, 1], [4, 4, 1], [6, 9, 1], [5, 6, 7, 8, 1], [11, 1]]
TEXT = {
    "ids": torch.tensor([[PAD] * (6 - len(row)) + row for row in TEXT_ROWS]),
    "mask": torch.tensor([[False] * (6 - len(row)) + [True] * len(row) for row in TEXT_ROWS]),
}
ENTROPY, LM, CLIP = 0.3, 0.7, 0.2


def plain_policy_loss(model: Any, experience: Experience) -> tuple[Tensor, Tensor]:
    """(mean over all tokens of the clipped surrogate - ENTROPY H, mean cross-entropy of the text), row by row."""
    rollout, total, tokens = experience.rollout, torch.zeros((), dtype=torch.float64), 0
    for row in range(len(experience)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / 0.8
        for t, token in enumerate(response):
            logp = F.log_softmax(logits[len(prompt) + t - 1], 0)
            ratio = (logp[token] - experience.old_logprobs[row, t]).exp()
            advantage = experience.advantages[row, t]
            surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            total = total - surrogate - ENTROPY * -(logp.exp() * logp).sum()
            tokens += 1
    text = [
        F.cross_entropy(model(input_ids=torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]), reduction="none")
        for row in TEXT_ROWS
    ]
    return total / tokens, torch.cat(text).mean()


def plain_critic_loss(model: Any, head: nn.Linear, experience: Experience) -> Tensor:
    """Mean over all tokens of 0.5 (V - R)^2."""
    rollout, errors = experience.rollout, []
    for row in range(len(experience)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        output = model(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
        values = head(output.hidden_states[-1][0])[:, 0]
        for t in range(len(response)):
            errors.append(0.5 * (values[len(prompt) + t - 1] - experience.returns[row, t]) ** 2)
    return torch.stack(errors).mean()


def plain_gradients(roles: Roles, experience: Experience) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Gradients of policy and critic by their names, and the losses, through peft alone."""
    policy, critic = plain_model(roles, "policy"), plain_model(roles, "critic")
    surrogate, text = plain_policy_loss(policy, experience)
    (surrogate + LM * text).backward()
    head = nn.Linear(16, 1).double()
    head.load_state_dict(roles.value_head.state_dict())
    value = plain_critic_loss(critic, head, experience)
    value.backward()
    mine = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    theirs = {n: p.grad for n, p in critic.named_parameters() if p.grad is not None}
    theirs |= {f"head.{n}": p.grad for n, p in head.named_parameters()}
    return mine, theirs, [surrogate.item(), text.item(), value.item()]


def updates(
    base: str, lora: LoraSettings | None, experience: Experience, tmp_path: Path, text: Any = TEXT, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """-(change of each parameter) after one minibatch of plain SGD with learning rate 1: the gradient that was used."""
    roles = double_roles(base, lora, changes.pop("checkpointing", False))
    top = roles.peft if lora else None
    policy_names = {p: n for n, p in (top or roles.models["policy"]).named_parameters()}
    critic_names = {p: n for n, p in (top or roles.models["critic"]).named_parameters()}
    critic_names |= {p: f"head.{n}" for n, p in roles.value_head.named_parameters()}
    policy, critic = roles.policy_parameters(), roles.critic_parameters()
    before = snapshot(policy), snapshot(critic)
    plain: dict[str, Any] = {
        "lr": 1.0, "critic_lr": 1.0, "iterations": 10**9, "optimizer": torch.optim.SGD, "epochs": 1,
        "minibatch_size": 8,
        "max_grad_norm": 1e9, "entropy_coef": ENTROPY, "ptx_coef": LM, "temperature": 0.8, "value_loss": SquaredError(),
        "policy_loss": ClippedSurrogate(CLIP, CLIP),
    }  # fmt: skip
    module = make_module(roles, **(plain | changes))
    recorder, _ = fit(module, tmp_path, iterations=1, callbacks=(Inject(experience, text),))
    return (
        {policy_names[p]: b - p.detach() for p, b in zip(policy, before[0], strict=True)},
        {critic_names[p]: b - p.detach() for p, b in zip(critic, before[1], strict=True)},
        recorder.by_step()[1],
    )


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    moved = {name for name, gradient in actual.items() if gradient.any()}
    assert moved <= set(expected)
    for name, gradient in expected.items():
        if name in actual:
            torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("lora", "micro_batch_size"), [(LORA, 1), (LORA, 3), (LORA, 8), (None, 3)], ids=["1", "3", "8", "full-3"]
)
def test_a_minibatch_moves_the_parameters_by_the_gradient_of_the_plain_loss(
    base: str, experience: Experience, lora: LoraSettings | None, micro_batch_size: int, tmp_path: Path
) -> None:
    """Checklist 1, 2, 14, 43, 47, 53, 56, 60. Ragged rows, entropy bonus and text; whatever the micro-batch size."""
    policy, critic, logged = updates(base, lora, experience, tmp_path, micro_batch_size=micro_batch_size)
    mine, theirs, losses = plain_gradients(double_roles(base, lora), experience)
    assert_same_gradients(policy, mine)
    assert_same_gradients(critic, theirs)
    assert sum(gradient.any().item() for gradient in policy.values()) >= 8
    assert logged["policy/loss"] - ENTROPY * logged["policy/entropy"] == pytest.approx(losses[0], abs=1e-5)
    assert logged["policy/lm_loss"] == pytest.approx(losses[1], abs=1e-5)
    assert logged["critic/loss"] == pytest.approx(losses[2], abs=1e-5)
    assert 0 < logged["policy/clip_fraction"] < 1
    for name, gradient in (("policy", policy), ("critic", critic)):
        norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
        assert logged[f"{name}/grad_norm"] == pytest.approx(norm, rel=1e-5)


@KINDS
def test_checkpointing_moves_the_parameters_alike(
    base: str, experience: Experience, lora: LoraSettings | None, tmp_path: Path
) -> None:
    """Checklist 47, 60."""
    plain = updates(base, lora, experience, tmp_path, micro_batch_size=3)
    recomputing = updates(base, lora, experience, tmp_path, micro_batch_size=3, checkpointing=True)
    assert_same_gradients(recomputing[0], plain[0])
    assert_same_gradients(recomputing[1], plain[1])


def wider(experience: Experience) -> Experience:
    """Two more columns of padding left of the prompts and three right of the responses, with words and NaN in them."""
    rollout, nan = experience.rollout, float("nan")
    changed = replace(
        rollout,
        prompt_ids=F.pad(rollout.prompt_ids, (2, 0), value=7),
        prompt_mask=F.pad(rollout.prompt_mask, (2, 0)),
        response_ids=F.pad(rollout.response_ids.where(rollout.response_mask, 5), (0, 3), value=9),
        response_mask=F.pad(rollout.response_mask, (0, 3)),
        behavior_logprobs=F.pad(rollout.behavior_logprobs, (0, 3)),
    )
    names = ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns")
    junk = {n: F.pad(getattr(experience, n).where(experience.mask, nan), (0, 3), value=nan) for n in names}
    return replace(experience, rollout=changed, **junk)


def test_padding_changes_no_update_whatever_it_holds(base: str, experience: Experience, tmp_path: Path) -> None:
    """Checklist 11, 13, 36, 47."""
    text = {"ids": F.pad(TEXT["ids"].where(TEXT["mask"], 6), (3, 0), value=8), "mask": F.pad(TEXT["mask"], (3, 0))}
    plain = updates(base, LORA, experience, tmp_path, micro_batch_size=3)
    padded = updates(base, LORA, wider(experience), tmp_path, text, micro_batch_size=3)
    assert_same_gradients(padded[0], plain[0])
    assert_same_gradients(padded[1], plain[1])
    for name in ("policy/loss", "policy/old_kl", "policy/ratio", "policy/entropy", "critic/loss", "policy/lm_loss"):
        assert padded[2][name] == pytest.approx(plain[2][name], abs=1e-6), name
    explained = "critic/explained_variance"
    assert padded[2][explained] == pytest.approx(plain[2][explained], abs=1e-6)


def test_the_text_loss_has_a_weight_of_its_own(base: str, experience: Experience, tmp_path: Path) -> None:
    """Checklist 56. Twice the weight is twice the difference to no text at all; and it never reaches the critic."""
    none, one, two = (
        updates(base, LORA, experience, tmp_path, text, ptx_coef=coef)
        for text, coef in ((None, 0.0), (TEXT, 0.5), (TEXT, 1.0))
    )
    for name in none[0]:
        torch.testing.assert_close(two[0][name] - none[0][name], 2 * (one[0][name] - none[0][name]), atol=1e-6, rtol=0)
    assert any((one[0][name] - none[0][name]).abs().max() > 1e-3 for name in none[0])
    assert_same_gradients(two[1], none[1])
    assert "policy/lm_loss" not in none[2]


def test_a_text_of_one_token_neither_counts_nor_spoils_the_log(
    base: str, experience: Experience, tmp_path: Path
) -> None:
    """Checklist 12, 56. Nothing in it is predicted."""
    mask = TEXT["mask"].clone()
    mask[1, :-1] = False
    logged = updates(base, LORA, experience, tmp_path, {"ids": TEXT["ids"], "mask": mask}, micro_batch_size=1)[2]
    assert math.isfinite(logged["policy/lm_loss"])


def test_gradients_are_clipped_once_a_step_and_logged_before(
    base: str, experience: Experience, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checklist 50. After all micro-batches, each role by its own norm."""
    free = updates(base, LORA, experience, tmp_path, micro_batch_size=1)
    calls, original = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    clipped = updates(base, LORA, experience, tmp_path, micro_batch_size=1, max_grad_norm=0.01)
    assert len(calls) == 2
    for role in (0, 1):
        name = ("policy", "critic")[role]
        whole = torch.cat([g.flatten() for g in free[role].values()])
        short = torch.cat([g.flatten() for g in clipped[role].values()])
        assert whole.norm() > 0.1
        assert short.norm().item() == pytest.approx(0.01, rel=1e-3)
        assert torch.cosine_similarity(whole, short, dim=0).item() == pytest.approx(1, abs=1e-6)
        assert clipped[2][f"{name}/grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-5)


# Minibatches, stopping, warming up


class Rows(Callback):
    """Which rows each policy loss saw, by a mark in the advantages."""

    def __init__(self, experience: Experience) -> None:
        marks = torch.arange(1.0, len(experience) + 1).unsqueeze(1).expand_as(experience.advantages)
        self.experience = replace(experience, advantages=marks * experience.mask)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        batch["experience"] = self.experience


def test_each_epoch_and_iteration_has_a_permutation_of_its_own(base: str, tmp_path: Path) -> None:
    """Checklist 52. Every row once per epoch; no order twice."""
    roles = make_roles(base)
    rollout = ragged_rollout(rows=8)
    blank = torch.zeros(rollout.response_mask.shape)
    spy, rows = Spy(0.2, 0.2), Rows(ragged_experience(rollout, blank, blank))
    module = make_module(roles, epochs=3, minibatch_size=3, micro_batch_size=3, policy_loss=spy, lr=0.0, critic_lr=0.0)
    fit(module, tmp_path, iterations=2, callbacks=(rows,))
    pieces = [sorted({int(v) for v in a.flatten().tolist()} - {0}) for a in spy.advantages]
    assert [len(piece) for piece in pieces] == [3, 3, 2] * 6
    epochs = [pieces[i : i + 3] for i in range(0, 18, 3)]
    for epoch in epochs:
        assert sorted(row for piece in epoch for row in piece) == list(range(1, 9))
    assert len({str(epoch) for epoch in epochs}) > 4


def test_beyond_the_limit_on_the_old_kl_the_update_is_skipped_and_the_log_goes_on(base: str, tmp_path: Path) -> None:
    """Checklist 55. The first minibatch is learned from; the second is measured, logged and dropped."""
    roles = make_roles(base, spread=0.1)
    states: list[list[Tensor]] = []

    class AfterSteps(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            everything = [*roles.policy_parameters(), *roles.critic_parameters()]
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(lambda *args: states.append(snapshot(everything)))

    module = make_module(roles, lr=0.05, epochs=4, early_stop_kl=1e-4)
    recorder, trainer = fit(module, tmp_path, iterations=1, maker=make_maker(), callbacks=(AfterSteps(),))
    assert trainer.global_step == len(states) == 2
    assert same_bits(states[-1], [*roles.policy_parameters(), *roles.critic_parameters()])
    assert all(p.grad is None or not p.grad.any() for p in roles.policy_parameters())
    logged = recorder.by_step()[1]
    assert logged["policy/early_stop"] == 1
    assert logged["train/optimizer_steps"] == 1
    assert logged["policy/old_kl"] > 1e-4 / 2
    assert {"policy/loss", "critic/loss", "rollout/score", "policy/grad_norm"} <= set(logged)


def test_a_limit_that_is_not_reached_stops_nothing(base: str, tmp_path: Path) -> None:
    """Checklist 55."""
    module = make_module(make_roles(base), lr=1e-4, early_stop_kl=10.0)
    recorder, trainer = fit(module, tmp_path, iterations=1, maker=make_maker())
    assert trainer.global_step == 8
    assert recorder.by_step()[1]["policy/early_stop"] == 0


@KINDS
@ON_OFF
def test_while_the_critic_warms_up_the_policy_keeps_every_bit(
    base: str, lora: LoraSettings | None, checkpointing: bool, tmp_path: Path
) -> None:
    """Checklist 60. And moves in the first iteration after."""
    roles = make_roles(base, lora, gradient_checkpointing=checkpointing)
    policies: list[list[Tensor]] = []
    critics: list[list[Tensor]] = []

    class Look(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            policies.append(snapshot(roles.policy_parameters()))
            critics.append(snapshot(roles.critic_parameters()))

    start = snapshot(roles.policy_parameters())
    module = make_module(roles, critic_warmup=2, iterations=3)
    recorder, _ = fit(module, tmp_path, iterations=3, maker=make_maker(), callbacks=(Look(),))
    same = [all(torch.equal(a, b) for a, b in zip(start, policy, strict=True)) for policy in policies]
    assert same == [True, True, False]
    assert not any(torch.equal(a, b) for a, b in zip(critics[0], critics[1], strict=True) if b.any() and b.numel() > 16)
    assert [row["rollout/kl"] for row in recorder.by_step().values()] == [0, 0, 0]


def test_critic_warm_up_warns_of_nothing(base: str, tmp_path: Path) -> None:
    """Checklist 51, 60. A schedule that moves before its optimizer's first step makes torch complain."""
    module = make_module(make_roles(base), critic_warmup=1)
    fit(module, tmp_path, maker=make_maker())


def test_temperature_of_the_update_is_the_settings_own(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checklist 14. A rollout at 0.7 learned from at 0.7 has ratio 1; learned from at 1.0 it has not."""
    monkeypatch.setattr(RolloutCallback, "on_fit_start", lambda *_: None)  # which refuses the second
    for temperature, expected in ((0.7, True), (1.0, False)):
        spy = Spy(0.2, 0.2)
        module = make_module(make_roles(base), lr=0.0, critic_lr=0.0, policy_loss=spy, temperature=temperature)
        fit(module, tmp_path, iterations=1, maker=make_maker(temperature=0.7, kl_controller=FixedKL(0.0)))
        assert (max(spy.moved) < 1e-5) == expected


def test_one_temperature_reaches_sampler_and_update() -> None:
    """Checklist 14."""
    run = compose(["stage=ppo", "rollout.temperature=0.7"])
    assert settings_of(run).temperature == 0.7
    assert experience_maker(run).sampler.temperature == 0.7


@pytest.mark.parametrize("knob", ["rollout.top_p=0.9", "rollout.top_k=10", "rollout.repetition_penalty=1.1"])
def test_knobs_that_bend_the_sampled_distribution_do_not_exist(knob: str) -> None:
    """Checklist 15."""
    with pytest.raises(ConfigError, match=f"^{knob}: .*the whole distribution"):
        compose(["stage=ppo", knob])


def configured(base: str, folder: Path, *overrides: str) -> PPOModule:
    """The module as the stage's builder makes it."""
    model = ["model=gpt2", f"model.path={base}", f"model.fast_cpu={FAST_CPU}"]
    run = compose(["stage=ppo", *model, "reward=vader", *overrides])
    return PPOStage(run).build(TinyCorpus(), folder)[0]


def test_the_configured_optimizers_are_adam_with_the_epsilon_of_the_details(base: str, tmp_path: Path) -> None:
    """Checklist 51. And the schedule falls to 0 over ppo.num_iterations."""
    module = configured(base, tmp_path, "ppo.lr=0.01", "ppo.critic_lr=0.02", "ppo.num_iterations=5")
    trained = module.roles.policy_parameters(), module.roles.critic_parameters()
    for optimizer, schedule, lr, own in zip(*module.configure_optimizers(), (0.01, 0.02), trained, strict=True):
        assert isinstance(optimizer, torch.optim.Adam)
        assert optimizer.defaults["eps"] == 1e-5
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in own]
        seen = []
        for _ in range(5):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert seen == pytest.approx([lr * (5 - i) / 5 for i in range(5)])
        assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("advantage", ["rloo", "reinforce_pp"])
def test_an_estimator_without_values_has_no_critic_and_one_optimizer(base: str, tmp_path: Path, advantage: str) -> None:
    """As the builder makes it."""
    module = configured(base, tmp_path, f"advantage={advantage}", "rollout.samples_per_prompt=4")
    assert module.roles.value_head is None
    assert not module.roles.critic_parameters()
    (optimizer,), _ = module.configure_optimizers()
    assert len(optimizer.param_groups[0]["params"]) == len(module.roles.policy_parameters())


def test_a_batch_without_experience_is_a_plain_error(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"add RolloutCallback\(ExperienceMaker\(\)\) to the Trainer's callbacks"):
        fit(make_module(make_roles(base)), tmp_path, iterations=1)


def test_a_function_trains_as_the_object_with_the_same_scores(base: str, tmp_path: Path) -> None:
    def scripted(*texts: Any) -> list[float]:
        return ScriptedReward().score(*texts)

    modules = [make_module(make_roles(base), reward=reward) for reward in (scripted, ScriptedReward())]
    for module in modules:
        fit(module, tmp_path, maker=make_maker(), iterations=1)
    one, two = ([p.detach() for p in module.roles.policy_parameters()] for module in modules)
    assert same_bits(one, two)


def test_what_is_no_reward_is_refused(base: str) -> None:
    with pytest.raises(ConfigError, match="reward: str has no method score"):
        make_module(make_roles(base), reward="vader")
    with pytest.raises(ConfigError, match="gold_reward: str has no method score"):
        PPOModule(make_roles(base), ScriptedReward(), gold_reward="vader")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"minibatch_size": 9}, "minibatch_size"), ({"minibatch_size": 0}, "minibatch_size"), ({"epochs": 0}, "epochs"),
     ({"micro_batch_size": 0}, "micro_batch_size"), ({"max_grad_norm": 0.0}, "max_grad_norm"),
     ({"entropy_coef": -1.0}, "entropy_coef"), ({"ptx_coef": -1.0}, "ptx_coef"),
     ({"early_stop_kl": 0.0}, "early_stop_kl"), ({"critic_warmup": -1}, "critic_warmup"),
     ({"batch_size": 0}, "batch_size")],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(base: str, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        make_module(make_roles(base), **changes)


def test_warm_up_leaves_the_weight_of_the_penalty_alone(base: str, tmp_path: Path) -> None:
    """Checklist 57, 60. A policy that does not move has a KL(old || new) of 0: no reason to halve the weight."""
    controller = DoublingKL(kl_coef=1.0, kl_target=0.01)
    module = make_module(make_roles(base), old_kl_controller=controller, critic_warmup=2, policy_loss=Surrogate())
    fit(module, tmp_path, maker=make_maker(), iterations=2)
    assert controller.kl_coef == 1.0
