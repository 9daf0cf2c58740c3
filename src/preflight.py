"""What can be known to be wrong before any weights are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PretrainedConfig

from src.models.loading import context_length, load_config, unmatched_targets
from src.models.settings import LoraSettings, ModelSettings
from src.utils.config import ConfigError, instantiate, resolve, source_key


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
    Range("ppo.iterations ppo.batch_size ppo.eval_prompts rollout.max_prompt_tokens rollout.batch_size", 1),
    Range(
        "sft.steps sft.batch_size sft.eval_rows reward_model.steps reward_model.batch_size reward_model.max_tokens", 1
    ),
    Range("sft.max_tokens ppo.lm_max_tokens reward_model.normalise_samples", 2),
    Range("ppo.lr ppo.critic_lr sft.lr reward_model.lr sft.weight_decay reward_model.weight_decay", 0),
    Range("ppo.warmup sft.warmup reward_model.warmup reward_model.min_gap", 0),
    Range("ppo.adam_eps sft.max_grad_norm reward_model.max_grad_norm", 0, open_ended=True),
    Range("callbacks.samples.every callbacks.samples.rows", 1),
)


def preflight(config: DictConfig) -> None:
    """Raise `ConfigError` or `ModelError` with one sentence, if this configuration cannot work."""
    resolve(config)
    model: ModelSettings = instantiate(config.model)
    if not re.fullmatch(r"sdpa|eager|flash_attention.*", model.attn_implementation):
        value = model.attn_implementation
        raise ConfigError(f"model.attn_implementation={value!r}: must be sdpa, eager or flash_attention_2")
    if str(config.trainer.devices) != "1":
        raise ConfigError(f"trainer.devices={config.trainer.devices}: only one process is supported, so it must be 1")
    for name in config.checks:
        instantiate(config.checks[name])
    _check_ranges(config)
    instantiate(config.callbacks)
    architecture = _architecture(model)
    if architecture is not None:
        _check_length(config, model, architecture)
        _check_targets(config, model, architecture)
    if config.stage == "ppo" and config.reward.get("path") is not None:
        _check_reward(config.reward.path)


def _check_ranges(config: DictConfig) -> None:
    for allowed in RANGES:
        for key in allowed.keys.split():
            value = OmegaConf.select(config, key)
            if allowed.refuses(value):
                raise ConfigError(f"{source_key(config, key)}={value!r}: must be {allowed}")


def _check_length(config: DictConfig, model: ModelSettings, architecture: PretrainedConfig) -> None:
    """What the stage reads at most must fit into the model's context."""
    limit, lengths = context_length(architecture), OmegaConf.to_container(config.sequence_tokens, resolve=False)
    assert isinstance(lengths, list)
    keys = [match[1] for length in lengths if (match := re.fullmatch(r"\$\{(.+)\}", str(length)))]
    needed = sum(config.sequence_tokens)
    if limit is not None and needed > limit:
        total = " + ".join(f"{key} ({OmegaConf.select(config, key)})" for key in keys)
        raise ConfigError(f"{total} may reach {needed} tokens, but model {model.name!r} reads at most {limit}")
    if config.stage == "reward":
        longest = context_length(instantiate(config.reward_model.scratch).config())
        value = config.reward_model.max_tokens
        if longest is not None and value > longest:
            raise ConfigError(f"reward_model.max_tokens={value}: the reward model reads at most {longest} tokens")


def _check_targets(config: DictConfig, model: ModelSettings, architecture: PretrainedConfig) -> None:
    """Every layer named as a LoRA target must exist."""
    lora: LoraSettings | None = instantiate(config.sft.lora) if config.stage == "sft" else model.lora
    if lora is None or config.stage == "reward":
        return
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    unmatched = unmatched_targets(architecture, targets)
    if unmatched:
        raise ConfigError(
            f"model.lora.targets=[{','.join(targets)}]: no layer of model {model.name!r} is called "
            f"{' or '.join(unmatched)}; all-linear takes every linear layer"
        )


def _check_reward(path: str) -> None:
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
        return load_config(model.path)
    return model.scratch.config() if model.scratch is not None else None
