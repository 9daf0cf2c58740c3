"""Choices that exclude each other, and settings that no choice reads, are refused before a model is loaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from transformers import PreTrainedModel

from src.config.compose import compose, instantiate
from src.config.errors import CONF
from src.config.validate import preflight
from src.errors import ConfigError


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are made or read."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(refuse))
    for name in ("load_causal_lm", "build_tokenizer"):
        monkeypatch.setattr(f"src.models.loading.{name}", refuse)
    monkeypatch.setattr("src.models.roles.load_causal_lm", refuse)


@cache
def composed(*overrides: str) -> DictConfig:
    config = compose(list(overrides))
    config.run_dir = "/tmp/never-written"
    return config


def refusal(*overrides: str) -> str:
    """What composing or preflight says; one sentence on one line."""
    with pytest.raises(ConfigError) as refused:
        preflight(composed(*overrides))
    message = str(refused.value)
    assert "\n" not in message
    return message


GROUPS = "rollout.samples_per_prompt=4"
REFUSED: list[tuple[str, list[str]]] = [
    # an estimator and what it needs
    ("advantage=rloo", ["advantage=rloo", "add rollout.samples_per_prompt=4", "divisor of ppo.batch_size"]),
    ("advantage=group_relative", ["advantage=group_relative", "add rollout.samples_per_prompt=4"]),
    ("advantage=gae value_loss=none", ["advantage=gae needs a critic", "remove value_loss=none"]),
    (f"advantage=rloo {GROUPS} value_loss=clipped", ["advantage=rloo uses no values", "remove value_loss=clipped"]),
    (f"advantage=rloo {GROUPS} ppo.critic_lr=1e-3", ["trains no critic", "nothing reads ppo.critic_lr", "remove it"]),
    ("advantage=reward_to_go ppo.critic_warmup=3", ["nothing reads ppo.critic_warmup", "remove it"]),
    ("advantage=reward_to_go ppo.lam=0.9", ["nothing reads ppo.lam here", "advantage=gae"]),
    ("rollout.samples_per_prompt=5", ["rollout.samples_per_prompt=5", "a divisor of ppo.batch_size (64)"]),
    ("rollout.samples_per_prompt=0", ["rollout.samples_per_prompt=0", "at least 1"]),
    ("ppo.lam=2", ["ppo.lam=2", "between 0 and 1"]),
    ("advantage=td ppo.gamma=-0.1", ["ppo.gamma=-0.1", "between 0 and 1"]),
    ("advantage=baseline_running ppo.baseline_decay=1.0", ["ppo.baseline_decay=1.0", "less than 1"]),
    # TRPO
    ("policy_loss=trpo ppo.epochs=4", ["ppo.epochs=4", "policy_loss=trpo takes one step", "ppo.epochs=1"]),
    ("policy_loss=trpo model.attn_implementation=flash_attention_2",
     ["model.attn_implementation=flash_attention_2", "policy_loss=trpo differentiates twice", "use sdpa or eager"]),
    ("policy_loss=trpo model.gradient_checkpointing=true",
     ["model.gradient_checkpointing=true", "policy_loss=trpo cannot", "model.gradient_checkpointing=false"]),
    ("policy_loss=trpo ppo.ptx_coef=1", ["ppo.ptx_coef=1", "policy_loss=trpo cannot", "ppo.ptx_coef=0"]),
    ("policy_loss=trpo ppo.early_stop_kl=0.1", ["ppo.early_stop_kl=0.1", "policy_loss=trpo", "ppo.early_stop_kl=null"]),
    ("policy_loss=trpo ppo.max_kl=0", ["ppo.max_kl=0", "greater than 0"]),
    # the KL to the reference
    ("kl=loss kl_estimator=k1", ["kl_estimator=k1", "expected gradient of k1 is zero", "k2, k3 or exact"]),
    ("kl=none ppo.kl_coef=0.1", ["nothing reads ppo.kl_coef here", "kl_controller=adaptive or kl_controller=fixed"]),
    ("kl_controller=adaptive ppo.kl_target=0", ["ppo.kl_target=0", "greater than 0"]),
    ("kl_controller=adaptive ppo.kl_horizon=0", ["ppo.kl_horizon=0", "greater than 0"]),
    # the policy's loss
    ("policy_loss=kl_penalty ppo.old_kl_target=0", ["ppo.old_kl_target=0", "greater than 0"]),
    ("policy_loss=kl_penalty ppo.old_kl_coef=0", ["ppo.old_kl_coef=0", "greater than 0"]),
    ("policy_loss=kl_penalty ppo.epochs=1 ppo.minibatch_size=64",
     ["old_kl_controller=doubling", "one optimizer step", "ppo.epochs=2", "below ppo.batch_size (64)"]),
    # what the model or the data does not have
    ("model.lora.layers=9", ["model.lora.layers=9", "the model has 3 layers"]),
    ("data=custom data.path=x.jsonl data.columns.prompt=q gold_reward=none",
     ["reward=learned without reward.path", "data.columns.chosen", "reward=function"]),
    # what runs and leads nowhere
    ("ppo.critic_warmup=9 ppo.num_iterations=9",
     ["ppo.critic_warmup=9", "smaller than ppo.num_iterations (9)", "policy never learns"]),
    ("trainer.max_epochs=2", ["trainer.max_epochs=2", "trainer.max_epochs=1, and ppo.num_iterations"]),
    ("trainer.max_epochs=null", ["trainer.max_epochs=null", "trainer.max_epochs=1"]),
    ("kl_controller=adaptive ppo.kl_horizon=20 ppo.batch_size=100 ppo.minibatch_size=50",
     ["ppo.kl_horizon=20", "greater than a fifth of ppo.batch_size (100)"]),
    ("ppo.ptx_max_tokens=64", ["ppo.ptx_coef=0", "nothing reads ppo.ptx_max_tokens", "remove it"]),
    # precision
    *((f"trainer.precision={precision}", [f"trainer.precision={precision}", "must be 32-true or bf16-mixed"])
      for precision in ("16-mixed", "16-true", "bf16-true", "64-true", "transformer-engine", "16", "64")),
    ("policy_loss=reinforce ppo.clip=0.2", ["nothing reads ppo.clip here", "policy_loss=clip"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[overrides for overrides, _ in REFUSED])
def test_what_cannot_work_is_refused_with_a_remedy(overrides: str, words: list[str]) -> None:
    """Checklist 29, 32. Before anything is loaded, in one sentence that names the setting and what to write instead."""
    message = refusal(*overrides.split())
    for part in words:
        assert part in message, message


@pytest.mark.parametrize(
    "overrides",
    [
        "ppo.critic_warmup=8 ppo.num_iterations=9",
        f"experiment=sentiment advantage=rloo {GROUPS} ppo.num_iterations=1",  # the recipe sets ppo.critic_warmup
        "kl_controller=adaptive ppo.kl_horizon=21 ppo.batch_size=100 ppo.minibatch_size=50",
        "kl_controller=fixed ppo.batch_size=100 ppo.minibatch_size=50",
        "policy_loss=kl_penalty ppo.epochs=1",
        "policy_loss=kl_penalty ppo.epochs=2 ppo.minibatch_size=64",
        "policy_loss=kl_penalty old_kl_controller=fixed ppo.epochs=1 ppo.minibatch_size=64",
        "ppo.ptx_coef=0.1 ppo.ptx_max_tokens=64",
        "policy_loss=trpo ppo.max_grad_norm=2 ppo.adam_eps=1e-8 ppo.warmup=3",
        "trainer.precision=32",
        "trainer.precision='32'",
        "trainer.precision=32-true",
        "trainer.precision=bf16-mixed",
    ],
)
def test_what_lies_just_beside_is_allowed(overrides: str) -> None:
    """The nearest settings that do mean something."""
    preflight(composed(*overrides.split()))


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_precision_is_checked_in_every_stage(stage: str) -> None:
    assert "must be 32-true or bf16-mixed" in refusal(f"stage={stage}", "trainer.precision=16-mixed")


CRITICS = {"gae", "td", "baseline_value"}
ADVANTAGES = sorted(path.stem for path in (CONF / "advantage").glob("*.yaml"))


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_each_estimator_brings_or_takes_away_the_critic(advantage: str) -> None:
    """Nothing but its name is asked for, and samples to compare where it compares samples."""
    needs_groups = advantage in ("rloo", "group_relative")
    config = composed(f"advantage={advantage}", *([GROUPS] if needs_groups else []))
    preflight(config)
    assert (config.ppo.value_loss is not None) == (advantage in CRITICS)
    estimator = instantiate(config.ppo.advantage)
    assert (estimator.needs_values, estimator.needs_groups) == (advantage in CRITICS, needs_groups)
    assert estimator.needs_greedy == (advantage == "remax")


def test_the_estimators_with_a_critic_are_among_the_options() -> None:
    assert set(ADVANTAGES) > CRITICS


def test_kl_none_takes_estimator_and_controller_away() -> None:
    """Checklist 31."""
    config = composed("kl=none")
    preflight(config)
    maker = instantiate(config.checks.maker)
    assert maker.reference_kl.estimator is None
    assert not maker.reference_kl.in_reward
    assert not maker.reference_kl.in_loss
    assert maker.kl_controller.kl_coef == 0


def test_kl_in_the_loss_takes_an_estimator_whose_gradient_is_that_of_the_kl() -> None:
    """Checklist 29."""
    config = composed("kl=loss")
    preflight(config)
    maker = instantiate(config.checks.maker)
    assert maker.reference_kl.estimator.estimator.func.__name__ == "k2"
    assert (maker.reference_kl.in_reward, maker.reference_kl.in_loss) == (False, True)


@pytest.mark.parametrize(
    "overrides",
    ["kl=reward kl_estimator=none", "kl=loss kl_estimator=none", "kl=none kl_estimator=k1 kl_controller=fixed"],
)
def test_a_kl_that_is_half_chosen_is_refused(overrides: str) -> None:
    """Checklist 30, 31. The second fails an assertion in the middle of the first iteration."""
    assert "kl" in refusal(*overrides.split())


def test_a_recipes_weight_falls_away_with_the_kl(tmp_path: Path) -> None:
    """Checklist 31. As ppo.value_clip does with value_loss=clipped."""
    preflight(composed("experiment=movie_reviews", f"data.path={tmp_path}", "kl=none"))


@pytest.mark.parametrize(
    "overrides",
    [
        "policy_loss=trpo advantage=reward_to_go ppo.lr=0.1",
        "policy_loss=trpo advantage=reward_to_go ppo.minibatch_size=16",
        "policy_loss=trpo advantage=reward_to_go ppo.max_grad_norm=2",
        "policy_loss=trpo advantage=reward_to_go ppo.adam_eps=1e-8",
        "policy_loss=trpo advantage=reward_to_go ppo.warmup=3",
        "policy_loss=trpo old_kl_controller=doubling",
    ],
)
def test_what_trpo_never_reads_is_refused(overrides: str) -> None:
    """The policy takes one step on the whole batch, and its controller is never told of it."""
    assert "trpo" in refusal(*overrides.split())
