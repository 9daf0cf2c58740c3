"""Going on with other settings: what was configured holds, what was learned stays, and nothing else is touched."""

from __future__ import annotations

import copy
import json
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from transformers import LlamaConfig, LlamaForCausalLM, get_constant_schedule_with_warmup

from src.checkpointing.checkpoint import IterationCheckpoint, checkpoints
from src.checkpointing.metadata import RunMetadata, has_dropout
from src.config.compose import compose
from src.config.files import options
from src.errors import CheckpointError
from src.rewards.learned import LearnedReward
from src.rollout.kl_controller import AdaptiveKL, DoublingKL
from src.stages.objects import instantiate
from tests.tiny import (
    FIRST_WORD,
    FOREIGN_WARNINGS,
    fit,
    make_maker,
    make_module,
    make_roles,
    snapshot,
    write_lm,
    write_reward_model,
)

pytestmark = FOREIGN_WARNINGS
ITERATIONS, KILL = 3, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


class See(Callback):
    """Keeps the optimizers as they are before each iteration, and dies at the start of one."""

    def __init__(self, kill: int | None) -> None:
        self.kill, self.seen = kill, {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.kill:
            raise InterruptedError
        self.seen[batch_idx] = copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers])


class Run:
    """A run with a record, whole, killed or gone on with, whose module is changed by `change` before it starts."""

    def __init__(
        self,
        base: str,
        folder: Path,
        kill: int | None = None,
        schedule: Any = None,
        maker: Any = None,
        factories: tuple[str, ...] = ("policy", "critic"),
        allow: bool = True,
        **changes: Any,
    ) -> None:
        self.roles = make_roles(base)
        module = make_module(self.roles, iterations=ITERATIONS, **changes)
        module.lr_schedule = schedule or module.lr_schedule
        module.optimizer_factories = {role: module.optimizer_factories[role] for role in factories}
        saved, see = checkpoints(folder), See(kill)
        record = RunMetadata({"stage": "ppo", "ppo": {"num_iterations": ITERATIONS}}, {}, None, allow_changes=allow)
        try:
            self.recorder, self.trainer = fit(
                module, folder, maker=maker or make_maker(), iterations=ITERATIONS,
                callbacks=(record, see, IterationCheckpoint(str(folder), every=1, keep=9)),
                ckpt_path=saved[-1] if saved else None,
            )  # fmt: skip
        except InterruptedError:
            assert kill is not None
        self.seen = see.seen


OTHER = partial(torch.optim.Adam, eps=1e-3, betas=(0.5, 0.6), weight_decay=0.1)


def test_the_configured_rates_and_coefficients_hold_and_the_moments_stay(base: str, tmp_path: Path) -> None:
    """After 2 of 3 iterations of a line down to 0 a third of the rate is left, of the new one."""
    Run(base, tmp_path, kill=KILL)
    saved = torch.load(checkpoints(tmp_path)[-1], weights_only=True)["optimizer_states"]
    run = Run(base, tmp_path, lr=0.3, critic_lr=0.6, optimizer=OTHER)
    for optimizer, before, rate in zip(run.seen[KILL], saved, (0.3, 0.6), strict=True):
        (group,) = optimizer["param_groups"]
        assert group["lr"] == pytest.approx(rate / 3)
        assert (group["initial_lr"], group["eps"], group["betas"], group["weight_decay"]) == (
            rate, 1e-3, (0.5, 0.6), 0.1,
        )  # fmt: skip
        for mine, old in zip(optimizer["state"].values(), before["state"].values(), strict=True):
            assert all(torch.equal(mine[name], old[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    row = run.recorder.by_step()[ITERATIONS]
    assert (row["policy/lr"], row["critic/lr"]) == (pytest.approx(0.1), pytest.approx(0.2))
    configs = run.trainer.lr_scheduler_configs
    assert [config.scheduler.base_lrs for config in configs] == [[0.3], [0.6]]
    assert [config.scheduler.last_epoch for config in configs] == [ITERATIONS, ITERATIONS]


def test_another_schedule_holds_from_the_first_iteration_on(base: str, tmp_path: Path) -> None:
    """The rate of a constant schedule, where the line that was followed before had left a third of it."""
    Run(base, tmp_path, kill=KILL)
    run = Run(base, tmp_path, schedule=partial(get_constant_schedule_with_warmup, num_warmup_steps=0))
    assert run.recorder.by_step()[ITERATIONS]["policy/lr"] == pytest.approx(0.01)


def test_the_same_settings_give_the_same_bits(base: str, tmp_path: Path) -> None:
    """With the record, which writes the settings of the optimizers anew."""
    whole = Run(base, tmp_path / "whole")
    Run(base, tmp_path / "cut", kill=KILL)
    resumed = Run(base, tmp_path / "cut")
    mine, theirs = resumed.seen[KILL], whole.seen[KILL]
    assert [o["param_groups"] for o in mine] == [o["param_groups"] for o in theirs]
    assert resumed.recorder.by_step() == {ITERATIONS: whole.recorder.by_step()[ITERATIONS]}
    one, two = (snapshot([*run.roles.policy_parameters(), *run.roles.critic_parameters()]) for run in (whole, resumed))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def state_of(node: Any, group: str, earlier: Any = None) -> Any:
    """The state of an object that a node describes, made anew; after it has taken up an earlier one."""
    made = instantiate(node, f"ppo.{group}")
    if earlier is not None:
        made.load_state_dict(earlier)
    return made.state_dict()


@pytest.mark.parametrize("group", ["advantage", "kl_controller", "old_kl_controller", "score_scaling"])
def test_what_another_kind_did_not_keep_begins_afresh(group: str) -> None:
    """From every option to every other one of its group, through their states alone."""
    names = [name for name in options(group) if name != "none"]
    nodes = {
        name: getattr(compose(["stage=ppo", f"{group}={name}", "rollout.samples_per_prompt=2"]).ppo, group)
        for name in names
    }
    for before, after in permutations(nodes.values(), 2):
        kept, fresh = state_of(before, group), state_of(after, group)
        assert state_of(after, group, earlier=kept) == (kept if kept.keys() == fresh.keys() else fresh)


def test_a_run_goes_on_with_controllers_of_another_kind(base: str, tmp_path: Path) -> None:
    """From fixed coefficients, which are not kept, to one that adapts and one that doubles, each from its start.

    A horizon of 8 episodes and a target far above the KL lower the first by a fifth; the second is halved.
    """
    Run(base, tmp_path, kill=KILL)
    adaptive, doubling = AdaptiveKL(0.5, kl_target=1e6, kl_horizon=8), DoublingKL(0.5, kl_target=1e6)
    run = Run(base, tmp_path, maker=make_maker(kl_controller=adaptive), old_kl_controller=doubling)
    assert run.recorder.by_step()[ITERATIONS]["rollout/kl_coef"] == pytest.approx(0.5)
    assert (adaptive.kl_coef, doubling.kl_coef) == (pytest.approx(0.4), 0.25)


def test_states_of_more_optimizers_than_there_are_now_are_refused(base: str, tmp_path: Path) -> None:
    """As with policy_loss=trpo, which has none for the policy: Lightning would deal them out in their order."""
    Run(base, tmp_path, kill=KILL)
    with pytest.raises(CheckpointError, match=r"states of 2 optimizers, this run has 1 .*resume=never") as refused:
        Run(base, tmp_path, factories=("critic",))
    assert "\n" not in str(refused.value)


def configure(folder: str, **values: Any) -> None:
    """Other values in config.json."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def permute(folder: str) -> None:
    """The tokenizer's first two words change places."""
    path = Path(folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    one, two = sorted((word for word in words if words[word] >= FIRST_WORD), key=words.__getitem__)[:2]
    words[one], words[two] = words[two], words[one]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change", [partial(configure, score_bias=5.0), partial(configure, reads_chat_template=True), permute]
)
def test_a_reward_model_with_the_same_weights_that_reads_otherwise_is_refused(
    base: str, change: Any, tmp_path: Path
) -> None:
    """Its scores would be others; in another folder it is the same."""
    one, same, other = (write_reward_model(tmp_path / name) for name in ("one", "same", "other"))
    change(other)
    Run(base, tmp_path, kill=KILL, reward=LearnedReward(one, 4))
    with pytest.raises(
        CheckpointError, match=r"another tokenizer, .*score_bias \(of its reward\) than this"
    ) as refused:
        Run(base, tmp_path, reward=LearnedReward(other, 4), allow=False)
    assert "\n" not in str(refused.value)
    assert KILL in Run(base, tmp_path, reward=LearnedReward(same, 4), allow=False).seen


@pytest.mark.parametrize("kind", ["module", "attention"])
def test_other_ranks_would_draw_other_dropout(kind: str) -> None:
    """Checklist 48, 61. Of a stage whose model has any; the roles of PPO are never in training mode."""
    plain = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    config = copy.deepcopy(plain)
    if kind == "attention":
        config.attention_dropout = 0.1
    net, other = LlamaForCausalLM(config), LlamaForCausalLM(plain)
    if kind == "module":
        net.model.add_module("dropout", torch.nn.Dropout(0.1))
    assert has_dropout(SimpleNamespace(net=net))
    assert not has_dropout(SimpleNamespace(net=other))
    assert not has_dropout(SimpleNamespace(roles=net))
    record, trainer = RunMetadata({}, {}, None, allow_changes=False), SimpleNamespace(world_size=2)
    checkpoint = {"optimizer_states": [], "run": {"fingerprints": {}, "world_size": 1, "versions": {}}}
    with pytest.raises(CheckpointError, match="made by 1 processes, this run has 2, and its model has dropout"):
        record.on_load_checkpoint(trainer, SimpleNamespace(net=net), checkpoint)
