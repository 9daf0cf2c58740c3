"""Choices that exclude each other, and settings that lead nowhere: what one key's range cannot say."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from src.config.errors import format_value
from src.config.files import key_of
from src.config.schema import KL_LOST, KL_UNEVEN, NOT_OF_TRAINER, UNEVEN, PPORun, Run, Sharded
from src.errors import ConfigError


def wrong(run: Run) -> Iterator[str]:
    """A sentence on each setting of a run that cannot be what was asked."""
    if run.resume not in ("auto", "never") and not os.path.exists(os.path.expanduser(run.resume)):
        yield f"resume={run.resume!r}: must be auto, never, or the path of a checkpoint or a run folder"
    yield from _wrong_processes(run)
    if isinstance(run, PPORun):
        yield from _wrong_sizes(run)
        yield from _wrong_choices(run)
        if run.ppo.trust_region is not None:
            yield from _wrong_with_trpo(run)
        if isinstance(run.trainer.strategy, Sharded):
            yield from _wrong_with_shards(run)


def refuse(key: str, value: Any, why: str) -> None:
    """Raise `ConfigError`."""
    raise ConfigError(f"{key}={format_value(value)}: {why}")


def _wrong_processes(run: Run) -> Iterator[str]:
    """Arguments of the Trainer that mean something else here, and batches that cannot be shared out."""
    trainer = run.trainer
    for name, value in (trainer.model_extra or {}).items():
        if name in NOT_OF_TRAINER:
            yield f"trainer.{name}={format_value(value)}: is not supported; {NOT_OF_TRAINER[name]}"
    processes = trainer.devices * trainer.num_nodes
    if processes > 1 and trainer.strategy is None:
        yield f"trainer.devices={trainer.devices}: several processes need trainer=ddp"
    why = f"counts the rows of all processes together, so it must be a multiple of {processes} (trainer.devices"
    why += " x trainer.num_nodes)" if trainer.num_nodes > 1 else ")"
    keys = ("sft.batch_size", "reward_model.batch_size", "ppo.batch_size", "ppo.minibatch_size")
    sizes = {key: getattr(getattr(run, key.partition(".")[0], None), key.partition(".")[2], 0) for key in keys}
    common = math.gcd(*sizes.values())
    fitting = ", ".join(str(count) for count in range(1, common + 1) if common % count == 0)
    for key, value in sizes.items():
        if value % processes:
            yield f"{key}={value}: {why}; these numbers of processes would do: {fitting}"


def _wrong_sizes(run: PPORun) -> Iterator[str]:
    """Sizes that do not fit into each other."""
    ppo, samples = run.ppo, run.rollout.samples_per_prompt
    whole, horizon, warmup = f"ppo.batch_size ({ppo.batch_size})", getattr(ppo, "kl_horizon", None), ppo.critic_warmup
    if ppo.batch_size % samples:
        yield f"rollout.samples_per_prompt={samples}: must be a divisor of {whole}"
    if ppo.needs_groups and samples < 2:
        add = "add rollout.samples_per_prompt=4 (at least 2, and a divisor of ppo.batch_size)"
        yield f"advantage={run.choices['advantage']} compares samples of one prompt: {add}"
    if ppo.minibatch_size > ppo.batch_size:
        yield f"ppo.minibatch_size={ppo.minibatch_size}: must be at most {whole}"
    if warmup >= ppo.num_iterations:
        fewer = f"must be smaller than ppo.num_iterations ({ppo.num_iterations})"
        yield f"ppo.critic_warmup={warmup}: {fewer}, or the policy never learns"
    if horizon is not None and horizon <= 0.2 * ppo.batch_size:
        above = f"must be greater than a fifth of {whole}"
        yield f"ppo.kl_horizon={horizon}: {above}, or one iteration can set the coefficient to 0 for good"


def _wrong_choices(run: PPORun) -> Iterator[str]:
    """Choices that can be followed to the letter and lead nowhere."""
    ppo, choices = run.ppo, run.choices
    one_step = ppo.epochs * -(-ppo.batch_size // ppo.minibatch_size) == 1
    if choices.get("old_kl_controller") == "doubling" and one_step:
        why = "with one optimizer step per iteration KL(old || new) is always 0, so the coefficient halves for ever"
        mend = f"use ppo.epochs=2, or a ppo.minibatch_size below ppo.batch_size ({ppo.batch_size})"
        yield f"old_kl_controller=doubling: {why}; {mend}"
    if ppo.ptx_coef == 0 and "ppo.ptx_max_tokens" in map(key_of, run.overrides):
        yield "ppo.ptx_coef=0 leaves the PPO-ptx loss out, so nothing reads ppo.ptx_max_tokens: remove it"
    lost = KL_LOST.get((ppo.kl_in, choices.get("kl_estimator")))
    if lost is not None:
        yield f"kl_estimator={choices['kl_estimator']}: {lost}"
    for setting in KL_UNEVEN if ppo.kl_in == "both" else ():
        key, _, value = setting.rpartition("=")
        if str(choices.get(key, getattr(ppo, key.removeprefix("ppo."), None))).lower() == value:
            yield f"{setting}: {UNEVEN}"
    if (choices["policy_loss"], choices.get("old_kl_controller")) == ("kl_penalty", "none"):
        yield "old_kl_controller=none: policy_loss=kl_penalty would have no penalty; use doubling or fixed"
    if ppo.early_stop is not None and run.gold_reward is None:
        yield "early_stop=gold needs a gold score: choose one with gold_reward=vader or exact_match"
    if choices["reward"] == "adapter" and run.model.lora is None:
        yield "model.lora=null: policy and critic are whole models, so reward=adapter has no base to share"


def _wrong_with_shards(run: PPORun) -> Iterator[str]:
    """What needs the whole model on a process at times that the others do not know of."""
    if run.ppo.trust_region is not None:
        yield "policy_loss=trpo differentiates twice, which trainer=fsdp cannot: use trainer=ddp"
    if run.choices["engine"] != "local":
        why = "takes whole weights, of which trainer=fsdp keeps a part on each process"
        yield f"engine={run.choices['engine']} {why}: use engine=local, or trainer=ddp"
    if run.ppo.early_stop is not None:
        yield "early_stop=gold keeps whole weights, of which trainer=fsdp keeps a part on each process: use trainer=ddp"
    if run.choices["reward"] == "adapter":
        why = "reads the base of the policy, of which trainer=fsdp keeps a part on each process"
        yield f"reward=adapter {why}: use reward=learned with the model/ folder next to the adapter, or trainer=ddp"


def _wrong_with_trpo(run: PPORun) -> Iterator[str]:
    """What a natural-gradient step cannot do, and what it never reads."""
    ppo, attention = run.ppo, run.model.attn_implementation
    unread = ("ppo.lr", "ppo.minibatch_size", "ppo.max_grad_norm", "ppo.adam_eps", "ppo.warmup")
    for key in map(key_of, run.overrides) if ppo.value_loss is None else ():
        if key in unread:
            yield f"policy_loss=trpo without a critic never reads {key}: remove it"
    if ppo.epochs != 1:
        yield f"ppo.epochs={ppo.epochs}: policy_loss=trpo takes one step per iteration: ppo.epochs=1"
    if attention not in ("eager", "sdpa"):
        why = "policy_loss=trpo differentiates twice, which this cannot; use sdpa or eager"
        yield f"model.attn_implementation={attention}: {why}"
    off = {"model.gradient_checkpointing": (run.model.gradient_checkpointing, False), "ppo.ptx_coef": (ppo.ptx_coef, 0)}
    for key, (value, wanted) in (off | {"ppo.early_stop_kl": (ppo.early_stop_kl, None)}).items():
        if value != wanted:
            yield f"{key}={format_value(value)}: policy_loss=trpo cannot use it: {key}={format_value(wanted)}"
