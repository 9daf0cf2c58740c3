"""What can be known to be wrong before any weights are loaded."""

from __future__ import annotations

from omegaconf import DictConfig
from transformers import PretrainedConfig

from src.models.loading import context_length, load_config, unmatched_targets
from src.models.settings import ModelSettings
from src.utils.config import ConfigError, instantiate


def preflight(config: DictConfig) -> None:
    """Raise `ConfigError` or `ModelError` with one sentence, if this configuration cannot work."""
    model: ModelSettings = instantiate(config.model)
    for name in config.checks:
        instantiate(config.checks[name])
    architecture = _architecture(model)
    if architecture is None:
        return
    limit, needed = context_length(architecture), sum(config.sequence_tokens)
    if limit is not None and needed > limit:
        raise ConfigError(
            f"prompt and response together may reach {needed} tokens, but model {model.name!r} reads at most {limit}: "
            f"lower the lengths that sequence_tokens names in conf/stage/{config.stage}.yaml"
        )
    if config.stage == "ppo" and model.lora is not None:
        unmatched = unmatched_targets(architecture, model.lora.targets)
        if unmatched:
            raise ConfigError(
                f"model.lora.targets={list(model.lora.targets)}: no layer of model {model.name!r} is called "
                f"{' or '.join(unmatched)}; all-linear takes every linear layer"
            )


def _architecture(model: ModelSettings) -> PretrainedConfig | None:
    if model.path is not None:
        return load_config(model.path)
    return model.scratch.config() if model.scratch is not None else None
