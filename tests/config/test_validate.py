"""Choices that exclude each other, and settings that no choice reads, are refused before a model is loaded."""

from __future__ import annotations

from typing import Any

import hydra
import pytest
from transformers import PreTrainedModel

from src.config.compose import compose
from src.config.files import CONF, options, read
from src.config.schema import OPTIONS
from src.core.kl import ExactKL, k2
from src.errors import ConfigError
from src.stages.builders import stage_of
from src.stages.objects import instantiate
from tests.config.composed import GROUPS, composed, with_option


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are made or read."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(refuse))
    for name in ("load_causal_lm", "build_tokenizer"):
        monkeypatch.setattr(f"src.models.loading.{name}", refuse)
    monkeypatch.setattr("src.models.roles.load_causal_lm", refuse)


def check(overrides: str) -> None:
    """What a run does before it reads data or loads weights."""
    stage_of(compose(overrides.split())).check()


def refusal(overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        check(overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


REFUSED: list[tuple[str, list[str]]] = [
    # an estimator and what it needs
    ("advantage=rloo", ["advantage=rloo", "add rollout.samples_per_prompt=4", "divisor of ppo.batch_size"]),
    ("advantage=group_relative", ["advantage=group_relative", "add rollout.samples_per_prompt=4"]),
    (f"advantage=rloo {GROUPS} value_loss=clipped", ["part of advantage=baseline_value or gae", "leave value_loss"]),
    (f"advantage=rloo {GROUPS} ppo.critic_lr=1e-3", ["nothing reads ppo.critic_lr here", "value_loss=clipped"]),
    ("advantage=reward_to_go ppo.critic_warmup=3", ["nothing reads ppo.critic_warmup here", "value_loss=mse"]),
    ("advantage=reward_to_go ppo.lam=0.9", ["nothing reads ppo.lam here", "advantage=gae"]),
    ("rollout.samples_per_prompt=5", ["rollout.samples_per_prompt=5", "a divisor of ppo.batch_size (64)"]),
    # TRPO
    ("policy_loss=trpo ppo.epochs=4", ["ppo.epochs=4", "policy_loss=trpo takes one step", "ppo.epochs=1"]),
    ("policy_loss=trpo model.attn_implementation=flash_attention_2",
     ["model.attn_implementation=flash_attention_2", "policy_loss=trpo differentiates twice", "use sdpa or eager"]),
    ("policy_loss=trpo model.gradient_checkpointing=true",
     ["model.gradient_checkpointing=true", "policy_loss=trpo cannot", "model.gradient_checkpointing=false"]),
    ("policy_loss=trpo ppo.ptx_coef=1", ["ppo.ptx_coef=1", "policy_loss=trpo cannot", "ppo.ptx_coef=0"]),
    ("policy_loss=trpo ppo.early_stop_kl=0.1", ["ppo.early_stop_kl=0.1", "policy_loss=trpo", "ppo.early_stop_kl=null"]),
    ("policy_loss=trpo old_kl_controller=doubling", ["old_kl_controller is part of policy_loss=cispo or clip"]),
    *((f"policy_loss=trpo advantage=reward_to_go {key}=0.1", [f"trpo without a critic never reads {key}: remove it"])
      for key in ("ppo.lr", "ppo.max_grad_norm", "ppo.adam_eps")),
    *((f"policy_loss=trpo advantage=reward_to_go {key}=3", [f"trpo without a critic never reads {key}: remove it"])
      for key in ("ppo.minibatch_size", "ppo.warmup")),
    # the KL to the reference
    ("kl_estimator=k3", ["kl_estimator=k3: a reward acts through the sampled token", "kl=both takes exact or k3"]),
    ("kl_estimator=exact", ["kl_estimator=exact", "kl=reward needs k1"]),
    ("kl=both kl_estimator=k1", ["kl_estimator=k1: kl=both needs another", "kl=reward"]),
    ("kl=both kl_estimator=k2", ["kl_estimator=k2: kl=both needs another", "biased"]),
    ("kl=both aggregation=sequence_mean", ["aggregation=sequence_mean", "kl=reward"]),
    ("kl=both advantage=reinforce_pp", ["advantage=reinforce_pp", "kl=reward"]),
    ("kl=both correction=mask", ["correction=mask", "kl=reward"]),
    ("trainer=fsdp early_stop=gold gold_reward=vader", ["early_stop=gold keeps whole weights", "trainer=ddp"]),
    ("kl=both advantage=group_relative rollout.samples_per_prompt=4", ["advantage=group_relative", "kl=reward"]),
    ("kl=loss kl_estimator=k1", ["kl_estimator=k1", "expected gradient of k1 is zero", "k2, k3 or exact"]),
    ("kl=none ppo.kl_coef=0.1", ["nothing reads ppo.kl_coef here", "kl_controller=fixed or kl_controller=adaptive"]),
    ("kl_controller=adaptive ppo.kl_target=0", ["ppo.kl_target=0", "greater than 0"]),
    ("kl_controller=adaptive ppo.kl_coef=0", ["ppo.kl_coef=0", "greater than 0"]),
    ("kl_controller=adaptive ppo.kl_horizon=0", ["ppo.kl_horizon=0", "at least 1"]),
    ("kl_controller=adaptive ppo.kl_horizon=20 ppo.batch_size=100 ppo.minibatch_size=50",
     ["ppo.kl_horizon=20", "greater than a fifth of ppo.batch_size (100)"]),
    # the policy's loss
    ("policy_loss=kl_penalty old_kl_controller=none", ["would have no penalty", "use doubling or fixed"]),
    ("policy_loss=kl_penalty ppo.old_kl_target=0", ["ppo.old_kl_target=0", "greater than 0"]),
    ("policy_loss=kl_penalty ppo.epochs=1 ppo.minibatch_size=64",
     ["old_kl_controller=doubling", "one optimizer step", "ppo.epochs=2", "below ppo.batch_size (64)"]),
    ("policy_loss=dual_clip ppo.dual_clip=1.1", ["ppo.dual_clip=1.1", "greater than 1 + clip_high"]),
    ("policy_loss=reinforce ppo.clip=0.2", ["nothing reads ppo.clip here", "policy_loss=clip"]),
    # what the model or the data does not have
    ("model.lora.layers=9", ["model.lora.layers=9", "the model has 3 layers"]),
    ("model.lora.critic_layers=9", ["model.lora.critic_layers=9", "the model has 3 layers"]),
    ("model.lora.critic_layers=1 model.lora.layers=2", ["critic_layers=1", "null or 2, as layers=2"]),
    ("model.lora.critic_layers=1 advantage=rloo rollout.samples_per_prompt=2", ["critic_layers=1", "no critic"]),
    ("model.lora=null reward=adapter", ["model.lora=null", "reward=adapter has no base to share"]),
    ("data=custom data.path=x.jsonl data.columns.prompt=q gold_reward=none",
     ["reward=learned without reward.path", "data.columns.chosen", "reward=function"]),
    ("gold_reward=none early_stop=gold", ["early_stop=gold needs a gold score", "gold_reward=vader or exact_match"]),
    ("model.scratch=null", ["model.path=null", "must be a hub name or a folder"]),
    ("rollout.max_new_tokens=60", ["may reach 96 tokens", "model 'tiny' reads at most 64"]),
    # what runs and leads nowhere
    ("ppo.critic_warmup=9 ppo.num_iterations=9",
     ["ppo.critic_warmup=9", "smaller than ppo.num_iterations (9)", "policy never learns"]),
    ("ppo.minibatch_size=65", ["ppo.minibatch_size=65", "at most ppo.batch_size (64)"]),
    ("ppo.ptx_max_tokens=64", ["ppo.ptx_coef=0", "nothing reads ppo.ptx_max_tokens", "remove it"]),
    # processes
    ("trainer.devices=2", ["trainer.devices=2", "several processes need trainer=ddp"]),
    ("trainer=ddp trainer.devices=3", ["ppo.batch_size=64", "must be a multiple of 3 (trainer.devices)",
                                       "these numbers of processes would do: 1, 2, 4, 8, 16"]),
    ("trainer=ddp trainer.num_nodes=3", ["ppo.batch_size=64", "a multiple of 6 (trainer.devices x trainer.num_nodes)"]),
    ("trainer=ddp stage=sft sft.batch_size=3", ["sft.batch_size=3", "must be a multiple of 2"]),
    ("trainer=ddp stage=reward reward_model.batch_size=3", ["reward_model.batch_size=3", "must be a multiple of 2"]),
    ("trainer=ddp trainer.num_nodes=2", ["trainer.num_nodes=2", "start the processes by torchrun or srun"]),
    ("+trainer.strategy=fsdp", ["trainer.strategy='fsdp': is not supported; several processes train by trainer=ddp"]),
    ("trainer=fsdp policy_loss=trpo", ["policy_loss=trpo differentiates twice", "which trainer=fsdp cannot"]),
    ("trainer=fsdp engine=vllm", ["engine=vllm takes whole weights", "use engine=local, or trainer=ddp"]),
    ("trainer=fsdp reward=adapter reward.path=x", ["reward=adapter reads the base", "use reward=learned"]),
    ("+trainer.nonsense=1", ["trainer.nonsense: Lightning's Trainer has no such argument"]),
    ("+callbacks.mine=1", ["callbacks.mine: needs a _target_"]),
    # precision
    *((f"{stage} trainer.precision=16-mixed", ["trainer.precision='16-mixed'", "must be '32-true' or 'bf16-mixed'"])
      for stage in ("stage=sft", "stage=reward", "stage=ppo")),
]  # fmt: skip


@pytest.mark.slow
def test_what_cannot_work_is_refused_with_a_remedy() -> None:
    """Checklist 29, 31, 32. Before anything is loaded, in one sentence with the setting and what to write instead."""
    for overrides, words in REFUSED:
        message = refusal(overrides)
        for part in words:
            assert part in message, (overrides, message)


def test_what_lies_just_beside_is_allowed() -> None:
    """The nearest settings that do mean something."""
    for overrides in (
        "ppo.critic_warmup=8 ppo.num_iterations=9",
        f"experiment=sentiment advantage=rloo {GROUPS} ppo.num_iterations=1",  # the experiment sets ppo.critic_warmup
        "kl_controller=adaptive ppo.kl_horizon=21 ppo.batch_size=100 ppo.minibatch_size=50",
        "kl_controller=fixed ppo.kl_coef=0 ppo.batch_size=100 ppo.minibatch_size=50",
        "policy_loss=kl_penalty ppo.epochs=1",
        "policy_loss=kl_penalty ppo.epochs=2 ppo.minibatch_size=64",
        "policy_loss=kl_penalty old_kl_controller=fixed ppo.epochs=1 ppo.minibatch_size=64",
        "ppo.ptx_coef=0.1 ppo.ptx_max_tokens=64",
        "policy_loss=trpo ppo.max_grad_norm=2 ppo.adam_eps=1e-8 ppo.warmup=3",
        "trainer.precision=bf16-mixed",
        "trainer=ddp trainer.devices=4",
        "+trainer.benchmark=true",
        "experiment=arithmetic kl=none",  # the experiment sets ppo.kl_coef
    ):
        check(overrides)


def test_a_resumed_run_or_checkpoint_must_be_there(tmp_path: Any) -> None:
    compose([f"resume={tmp_path}"])
    assert "must be auto, never, or the path" in refusal(f"resume={tmp_path}/nowhere")


def test_each_estimator_brings_or_takes_away_the_critic() -> None:
    """Nothing but its name is asked for, and samples to compare where it compares samples."""
    critics = set()
    for name in options("advantage"):
        run = with_option("ppo", f"advantage={name}")
        brought = run.choices.get("value_loss") is not None
        assert ("value_loss" in run.plain()["ppo"]) == brought, name
        estimator = instantiate(run.plain()["ppo"]["advantage"], "ppo.advantage")
        assert estimator.needs_values == brought, (
            f"conf/advantage/{name}.yaml: `/value_loss: clipped` belongs under `defaults` if needs_values, else not"
        )
        critics |= {name} if brought else set()
    assert {"gae", "td", "baseline_value"} <= critics < set(options("advantage"))


def test_the_schema_knows_which_estimators_compare_samples() -> None:
    for name, kind in OPTIONS["advantage"][1].items():
        content = read(CONF / "advantage" / f"{name}.yaml")
        estimator = hydra.utils.get_class(content.get("ppo", content)["advantage"]["_target_"])
        needed = estimator.needs_groups  # type: ignore[attr-defined]
        assert getattr(kind, "needs_groups", False) == needed, (
            f"advantage={name}: {kind.__name__} in src/config/schema/ must inherit from OfAPrompt if "
            f"{estimator.__name__}.needs_groups, else not"
        )


def test_kl_none_takes_estimator_and_controller_away() -> None:
    """Checklist 31."""
    run = composed("kl=none")
    assert not {"kl_estimator", "kl_controller", "kl_coef", "kl_in"} & set(run.plain()["ppo"])
    stage = stage_of(run)
    stage.check()
    assert stage.maker.reference_kl.estimator is None
    assert not stage.maker.reference_kl.in_reward
    assert not stage.maker.reference_kl.in_loss
    assert stage.maker.kl_controller.kl_coef == 0


def test_kl_in_the_loss_takes_an_estimator_whose_gradient_is_that_of_the_kl() -> None:
    """Checklist 29."""
    maker = stage_of(composed("kl=loss")).maker
    assert maker.reference_kl.estimator.estimator.func is k2
    assert (maker.reference_kl.in_reward, maker.reference_kl.in_loss) == (False, True)
    maker = stage_of(composed()).maker
    assert (maker.reference_kl.in_reward, maker.reference_kl.in_loss) == (True, False)
    maker = stage_of(composed("kl=both")).maker
    assert (maker.reference_kl.in_reward, maker.reference_kl.in_loss) == (True, True)
    assert maker.reference_kl.estimator == ExactKL()


def test_a_kl_that_is_half_chosen_is_refused() -> None:
    """Checklist 30, 31. None of them would fail before the middle of the first iteration."""
    for overrides in (
        "kl=reward ppo.kl_estimator=null", "kl=loss ppo.kl_controller=null", "kl=loss ppo.kl_in=reward",
        "kl=none kl_estimator=k1 kl_controller=fixed", "kl=reward kl_estimator=none",
    ):  # fmt: skip
        assert "kl" in refusal(overrides)
