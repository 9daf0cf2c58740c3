"""What can be known to be wrong before any weights are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PretrainedConfig

from src.config.compose import instantiate, resolve, source_key
from src.config.errors import key_of
from src.config.futile import refuse_futile
from src.config.value_types import said
from src.core.estimators import Estimator
from src.errors import ConfigError
from src.models.loading import context_length, load_config, run_part, unmatched_targets
from src.models.reward_choices import RewardChoice
from src.models.settings import LoraSettings, ModelSettings
from src.utils.device import accelerator
from src.utils.launch import launched


@dataclass(frozen=True)
class Range:
    """Settings that no constructor checks before something is loaded, and the least they may be."""

    keys: str
    least: float
    open_ended: bool = False  # the least itself is not allowed

    def refuses(self, value: Any) -> bool:
        """Whether a number lies outside."""
        return isinstance(value, int | float) and not (value > self.least if self.open_ended else value >= self.least)

    def __str__(self) -> str:
        return f"{'greater than' if self.open_ended else 'at least'} {self.least:g}"


RANGES = (
    Range("ppo.num_iterations ppo.batch_size ppo.eval_prompts", 1),
    Range("rollout.samples_per_prompt rollout.max_prompt_tokens rollout.scoring_batch_size", 1),
    Range(
        "sft.steps sft.batch_size sft.eval_rows reward_model.steps reward_model.batch_size reward_model.max_tokens", 1
    ),
    Range("sft.max_tokens ppo.ptx_max_tokens reward_model.normalization_samples", 2),
    Range("ppo.lr ppo.critic_lr sft.lr reward_model.lr sft.weight_decay reward_model.weight_decay", 0),
    Range("ppo.warmup sft.warmup reward_model.warmup reward_model.min_gap", 0),
    Range("reward_model.margin_coef reward_model.center_coef reward_model.lm_coef", 0),
    Range("ppo.adam_eps sft.max_grad_norm reward_model.max_grad_norm", 0, open_ended=True),
    Range("callbacks.samples.every callbacks.samples.rows", 1),
)

# PPO steps by hand: gradients of 16-mixed would be clipped while still scaled, and the others change what is a float
PRECISIONS = ("32-true", 32, "32", "bf16-mixed")


def preflight(config: DictConfig) -> None:
    """Raise `ConfigError` or `ModelError` with one sentence, if this configuration cannot work."""
    resolve(config)
    model: ModelSettings = instantiate(config.model)
    if not re.fullmatch(r"sdpa|eager|flash_attention.*", str(model.attn_implementation)):
        value = model.attn_implementation
        raise ConfigError(f"model.attn_implementation={said(value)}: must be sdpa, eager or flash_attention_2")
    _check_processes(config)
    for name in config.checks:
        instantiate(config.checks[name])
    _check_ranges(config)
    if config.stage == "ppo":
        _check_theory(config, model)
    instantiate(config.callbacks)
    architecture = _architecture(model)
    if architecture is not None:
        _check_length(config, model, architecture)
        _check_targets(config, model, architecture)
    if config.stage == "reward":
        _check_reward_net(config)
        _check_normalizing(config, architecture)
    if config.stage == "ppo":
        _check_shared_base(config, model)
        _check_pairs(config)
        _check_reward(config.reward)


def _check_ranges(config: DictConfig) -> None:
    for allowed in RANGES:
        for key in allowed.keys.split():
            value = OmegaConf.select(config, key)
            if allowed.refuses(value):
                raise ConfigError(f"{source_key(config, key)}={said(value)}: must be {allowed}")


def _check_processes(config: DictConfig) -> None:
    """On what and in how many processes, by what strategy, and whether batches can be shared out among them."""
    trainer = config.trainer
    accelerator(trainer.accelerator)
    if trainer.get("precision") not in PRECISIONS:
        value = trainer.get("precision")
        raise ConfigError(
            f"trainer.precision={value}: must be 32-true or bf16-mixed; model.dtype=bfloat16 halves the weights"
        )
    for key in ("devices", "num_nodes"):
        value = trainer.get(key, 1)
        if type(value) is not int or value < 1:
            raise ConfigError(f"trainer.{key}={value!r}: must be a whole number, at least 1")
    processes, strategy = trainer.devices * trainer.get("num_nodes", 1), trainer.get("strategy")
    together = isinstance(strategy, DictConfig) and strategy.get("_target_", "").endswith(".SummedGradients")
    if strategy is not None and not together:
        name = strategy.get("_target_") if isinstance(strategy, DictConfig) else strategy
        raise ConfigError(f"trainer.strategy={name}: is not supported; several processes train by trainer=ddp")
    if processes > 1 and not together:
        raise ConfigError(f"trainer.devices={trainer.devices}: several processes need trainer=ddp")
    if trainer.get("num_nodes", 1) > 1 and not launched():
        raise ConfigError(f"trainer.num_nodes={trainer.num_nodes}: start the processes by torchrun or srun")
    for key in ("ppo.batch_size", "ppo.minibatch_size", "sft.batch_size", "reward_model.batch_size"):
        value = OmegaConf.select(config, key)
        if isinstance(value, int) and value % processes:
            raise ConfigError(
                f"{key}={value}: counts the rows of all processes together, so it must be a multiple of {processes} "
                f"(trainer.devices{' x trainer.num_nodes' if trainer.get('num_nodes', 1) > 1 else ''})"
            )


def _check_theory(config: DictConfig, model: ModelSettings) -> None:
    """Choices that exclude each other, and settings that the chosen ones never read."""
    estimator: Estimator = instantiate(config.ppo.advantage)
    advantage, samples = f"advantage={config.choices.advantage}", config.rollout.samples_per_prompt
    if estimator.needs_groups and samples < 2:
        raise ConfigError(
            f"{advantage} compares samples of one prompt: add rollout.samples_per_prompt=4 "
            f"(at least 2, and a divisor of ppo.batch_size)"
        )
    if config.ppo.batch_size % samples:
        raise ConfigError(
            f"rollout.samples_per_prompt={samples}: must be a divisor of ppo.batch_size ({config.ppo.batch_size})"
        )
    if estimator.needs_values and config.ppo.value_loss is None:
        raise ConfigError(f"{advantage} needs a critic: remove value_loss=none")
    if not estimator.needs_values and config.ppo.value_loss is not None:
        raise ConfigError(f"{advantage} uses no values: remove value_loss={config.choices.value_loss}")
    unread = [] if estimator.needs_values else ["ppo.critic_lr", "ppo.critic_warmup"]
    for key in [key_of(override) for override in config.overrides]:
        if key in unread:
            raise ConfigError(f"{advantage} trains no critic, so nothing reads {key}: remove it")
    refuse_futile(config, estimator)
    _check_kl(config.choices)
    if config.choices.early_stop == "gold" and config.gold_reward is None:
        raise ConfigError("early_stop=gold needs a gold score: choose one with gold_reward=vader or exact_match")
    if "trust_region" in config.ppo:
        _check_trust_region(config, model)


def _check_kl(choices: DictConfig) -> None:
    """The reference is asked, measured and weighed, or none of it; and the penalty form of PPO has a penalty."""
    for group in ("kl_estimator", "kl_controller"):
        if (choices.kl == "none") != (choices[group] == "none"):
            raise ConfigError(f"{group}={choices[group]}: means nothing with kl={choices.kl}: remove it")
    if (choices.kl, choices.kl_estimator) == ("loss", "k1"):
        raise ConfigError("kl_estimator=k1: the expected gradient of k1 is zero, so kl=loss needs k2, k3 or exact")
    if (choices.policy_loss, choices.old_kl_controller) == ("kl_penalty", "none"):
        raise ConfigError("old_kl_controller=none: policy_loss=kl_penalty would have no penalty; use doubling or fixed")


def _check_trust_region(config: DictConfig, model: ModelSettings) -> None:
    """What a natural-gradient step cannot do, and what it never reads."""
    choice = config.choices.old_kl_controller
    if choice != "none":
        raise ConfigError(
            f"old_kl_controller={choice}: policy_loss=trpo bounds the KL instead of weighing it: remove it"
        )
    if config.ppo.value_loss is None:
        for key in [key_of(override) for override in config.overrides]:
            if key in ("ppo.lr", "ppo.minibatch_size", "ppo.max_grad_norm", "ppo.adam_eps", "ppo.warmup"):
                raise ConfigError(f"policy_loss=trpo without a critic never reads {key}: remove it")
    if config.ppo.epochs != 1:
        raise ConfigError(
            f"ppo.epochs={config.ppo.epochs}: policy_loss=trpo takes one step per iteration: ppo.epochs=1"
        )
    if model.attn_implementation not in ("eager", "sdpa"):
        value = model.attn_implementation
        raise ConfigError(
            f"model.attn_implementation={value}: policy_loss=trpo differentiates twice, which this cannot; "
            f"use sdpa or eager"
        )
    for key, off in {"model.gradient_checkpointing": False, "ppo.ptx_coef": 0, "ppo.early_stop_kl": None}.items():
        value = OmegaConf.select(config, key)
        if value != off:
            wanted = "null" if off is None else str(off).lower()
            raise ConfigError(f"{key}={value}: policy_loss=trpo cannot use it: {key}={wanted}".replace("True", "true"))


def _check_length(config: DictConfig, model: ModelSettings, architecture: PretrainedConfig) -> None:
    """What the stage reads at most must fit into the model's context."""
    limit, lengths = context_length(architecture), OmegaConf.to_container(config.max_sequence_length, resolve=False)
    assert isinstance(lengths, list)
    keys = [match[1] for length in lengths if (match := re.fullmatch(r"\$\{(.+)\}", str(length)))]
    needed = sum(config.max_sequence_length)
    if limit is not None and needed > limit:
        total = " + ".join(f"{key} ({OmegaConf.select(config, key)})" for key in keys)
        raise ConfigError(f"{total} may reach {needed} tokens, but model {model.name!r} reads at most {limit}")


def _check_targets(config: DictConfig, model: ModelSettings, architecture: PretrainedConfig) -> None:
    """Every layer named as a LoRA target must exist."""
    if config.stage == "sft":
        _check_layers(instantiate(config.sft.lora), architecture, "model.lora", repr(model.name))
    elif config.stage == "ppo":
        _check_layers(model.lora, architecture, "model.lora", repr(model.name))


def _check_layers(lora: LoraSettings | None, architecture: PretrainedConfig, key: str, name: str) -> None:
    layers = getattr(architecture, "num_hidden_layers", None)
    if lora is not None and lora.layers is not None and layers is not None and lora.layers > layers:
        raise ConfigError(f"{key}.layers={lora.layers}: the model has {layers} layers")
    targets = "all-linear" if lora is None else lora.targets
    unmatched = unmatched_targets(architecture, targets)
    if unmatched:
        raise ConfigError(
            f"{key}.targets=[{','.join(targets)}]: no layer of model {name} is called "
            f"{' or '.join(unmatched)}; all-linear takes every linear layer"
        )


def _check_reward_net(config: DictConfig) -> None:
    """What the reward model can read, its LoRA targets, and whether it has the head of a language-model loss."""
    choice: RewardChoice = instantiate(config.reward_model.net)
    if config.reward_model.lm_coef > 0 and not choice.has_lm_head():
        raise ConfigError(
            f"reward_model.lm_coef={config.reward_model.lm_coef}: reward_net={config.choices.reward_net} has no "
            f"vocabulary head here; a language model with one has it (reward_net=adapter, or pretrained)"
        )
    architecture = choice.architecture()
    if architecture is None:
        return
    longest, value = context_length(architecture), config.reward_model.max_tokens
    if longest is not None and value > longest:
        raise ConfigError(f"reward_model.max_tokens={value}: the reward model reads at most {longest} tokens")
    _check_layers(choice.lora, architecture, "reward_model.net.lora", "of the reward stage")


def _check_normalizing(config: DictConfig, architecture: PretrainedConfig | None) -> None:
    """The SFT policy must be able to read a prompt and write the samples that gain and bias are set on."""
    limit = None if architecture is None else context_length(architecture)
    longest = config.reward_model.normalization_max_new_tokens
    if limit is not None and longest >= limit and config.callbacks.get("normalize") is not None:
        raise ConfigError(
            f"reward_model.normalization_max_new_tokens={longest}: must be smaller than {limit}, which is all that "
            f"model {config.model.name!r} reads, prompt included"
        )


def _check_shared_base(config: DictConfig, model: ModelSettings) -> None:
    """An adapter on the policy's base is the reward itself, and there is a base."""
    adapter = "AdapterReward"
    if adapter in str(config.gold_reward) or (adapter in str(config.reward) and config.choices.reward != "adapter"):
        raise ConfigError("reward=adapter cannot be the gold score or a part of a reward: there use its model/ folder")
    if adapter in str(config.reward) and model.lora is None:
        raise ConfigError("model.lora=null: policy and critic are whole models, so reward=adapter has no base to share")


def _check_pairs(config: DictConfig) -> None:
    """A reward model that is to be trained for the run needs a set of preference pairs."""
    columns = config.data.get("columns")
    has_pairs = columns is None or "Comparisons" in columns._target_ or columns.get("chosen") is not None
    if not has_pairs and config.data.get("pairs") is None and config.reward.get("path", "") is None:
        raise ConfigError(
            f"reward={config.choices.reward} without reward.path trains a reward model on preference pairs, and this "
            f"data set names none (data.columns.chosen, data.columns.rejected): choose another reward, such as "
            f"reward=function or reward=numeric, or give reward.path"
        )


def _check_reward(reward: DictConfig) -> None:
    """A reward that loads nothing is made at once; of one that does, the folder must hold a reward model."""
    if "path" in reward and reward.path is None:
        return
    if "LearnedReward" not in str(reward):
        instantiate(reward)
    elif reward.get("path") is not None:
        _check_reward_model(run_part(reward.path, "model"))


def _check_reward_model(path: str) -> None:
    """A folder that says it holds another kind of model is no reward model."""
    architecture = load_config(path, "reward.path")
    kinds = architecture.architectures or []
    if kinds and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ConfigError(
            f"reward.path={path}: there is a {kinds[0]}, but a reward model is a sequence classifier with one output"
        )
    if architecture.num_labels != 1:
        raise ConfigError(f"reward.path={path}: the model has {architecture.num_labels} outputs where 1 is needed")


def _architecture(model: ModelSettings) -> PretrainedConfig | None:
    if model.path is not None:
        return load_config(model.path, trusted=model.trust_remote_code)
    return model.scratch.config() if model.scratch is not None else None
