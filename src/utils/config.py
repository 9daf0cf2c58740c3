"""Composing a stage's configuration, checking it, and making objects of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict

from src.core.checks import SettingError

CONF = Path(__file__).parents[2] / "conf"


class ConfigError(ValueError):
    """One sentence on what is wrong in the configuration, where, and what is allowed."""


def compose(overrides: list[str]) -> DictConfig:
    """The configuration that `python -m src.train OVERRIDES` runs with, its overrides kept in `overrides`.

    Raises Hydra's `ConfigCompositionException` for a key or option that does not exist and `ConfigError` for a key that
    an experiment or preset sets and nothing reads.
    """
    with _hydra():
        config = hydra.compose("train", overrides, return_hydra_config=True)
        choices = {group: choice for group, choice in config.hydra.runtime.choices.items() if group in _own_groups()}
        plain = hydra.compose("train", _without_experiment(choices, overrides))
    with open_dict(config):
        del config["hydra"]
        config.overrides = list(overrides)
        config.choices = choices
    declared = _leaves(plain)
    unread = sorted(
        leaf
        for leaf in _leaves(config) - declared
        if leaf.split(".")[0] not in ("overrides", "choices") and not any(d.startswith(f"{leaf}.") for d in declared)
    )
    if unread:
        raise ConfigError(f"nothing reads {', '.join(unread)}, set by experiment={config.choices.experiment}")
    return config


def takes(stage: str, overrides: list[str], override: str) -> bool:
    """Whether `override` means something to a stage that already has `overrides`."""
    try:
        with _hydra():
            hydra.compose("train", [f"stage={stage}", *overrides, override])
    except ConfigCompositionException:
        return False
    return True


def instantiate(node: Any) -> Any:
    """Make the object a configuration node describes; only here, so that one guard covers all of them.

    Raises `ConfigError` that names the configuration key when a setting is out of its range.
    """
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, SettingError):
            raise ConfigError(f"{_source_key(node, error, cause)}={cause.value!r}: must be {cause.allowed}") from error
        if cause is not None and not isinstance(cause, TypeError):
            raise cause from error
        raise


def _hydra() -> AbstractContextManager[Any]:
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return hydra.initialize_config_dir(str(CONF), version_base="1.3")


def _own_groups() -> set[str]:
    return {str(path.relative_to(CONF)) for path in CONF.rglob("*") if path.is_dir()}


def _without_experiment(choices: dict[str, str], overrides: list[str]) -> list[str]:
    """The same choices of groups, but no experiment: whatever is missing then was declared by no group.

    Keys that the command line adds with a `+` are the user's own affair.
    """
    kept = {g: c for g, c in choices.items() if g not in ("experiment", "recipe") and c is not None}
    added = [override for override in overrides if override.startswith("+")]
    return [*(f"{group}={choice}" for group, choice in kept.items()), "experiment=none", *added]


def _leaves(config: DictConfig) -> set[str]:
    """Dotted names of all keys that hold a plain value."""

    def walk(node: Any, prefix: str) -> set[str]:
        if not isinstance(node, dict):
            return {prefix}
        return {leaf for key, value in node.items() for leaf in walk(value, f"{prefix}.{key}" if prefix else str(key))}

    return walk(OmegaConf.to_container(config, resolve=False), "")


def _source_key(node: Any, error: InstantiationException, cause: SettingError) -> str:
    """The configuration key that the refused value came from, following interpolations to where it was written."""
    text = str(error)
    inner = text.rsplit("full_key: ", 1)[-1].strip() if "full_key: " in text else ""
    key, root = f"{inner}.{cause.name}" if inner else cause.name, OmegaConf.create(node)._get_root()
    raw = OmegaConf.to_container(node._get_root() if isinstance(node, DictConfig) else root, resolve=False)
    for _ in range(10):
        value: Any = raw
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not (isinstance(value, str) and value.startswith("${") and value.endswith("}")):
            return key
        key = value[2:-1]
    return key
