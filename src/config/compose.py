"""Composing a stage's configuration, checking it, and making objects of it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from src.config.errors import (
    CONF,
    SETS_OTHERS_KEYS,
    chosen_along,
    closest,
    declarations,
    explain,
    groups,
    key_of,
    misplaced_preset,
    quoted,
    refused_key,
    unreadable,
)
from src.config.value_types import at, leaves, said, wrong_value
from src.errors import ConfigError, SettingError

RESUME = ("auto", "never")


def compose(overrides: list[str]) -> DictConfig:
    """The configuration that `python -m src.train OVERRIDES` runs with, its overrides kept in `overrides`.

    Raises `ConfigError` for a key or option that does not exist, for a key that an experiment or preset sets and
    nothing reads, for a preset in another stage than PPO, and for a value of another type than the key's own.
    """
    overrides = [quoted(override) for override in overrides]
    wrong = unreadable(overrides) or misplaced_preset(overrides)
    if wrong is not None:
        raise ConfigError(wrong)
    try:
        with _hydra():
            config = hydra.compose("train", [*overrides, *chosen_along(overrides)], return_hydra_config=True)
            own = groups()
            choices = {group: choice for group, choice in config.hydra.runtime.choices.items() if group in own}
            options, added = _without_experiment(choices, overrides)
            declared, plain = _compose_once(options), _compose_once((*options, *added))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, overrides)) from error
    with open_dict(config):
        del config["hydra"]
        config.overrides = [override.replace("${", r"\${") for override in overrides]  # as they were typed
        config.choices = choices
    _refuse_unread(config, plain)
    sentence = wrong_value(config, declared) or _wrong_place(config)
    if sentence is not None:
        raise ConfigError(sentence)
    return config


def settings_hash(config: DictConfig, *others: str) -> str:
    """SHA-256 of what a run is asked to do; where its folder lies and what it is called (and `others`) do not count."""
    settings = OmegaConf.to_container(config, resolve=False)
    assert isinstance(settings, dict)
    for name in ("overrides", "choices", "run_dir", "log_dir", "name", "resume", "allow_config_change", *others):
        settings.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def taken(stage: str, overrides: list[str]) -> list[str]:
    """Those of the overrides that mean something to a stage; a preset does to PPO alone.

    Raises `ConfigError` for an option that does not exist.
    """
    left = [quoted(override) for override in overrides if stage == "ppo" or key_of(override) != "preset"]
    while True:
        try:
            with _hydra():
                hydra.compose("train", [f"stage={stage}", *left])
            return left
        except (HydraException, OmegaConfBaseException) as error:
            key = refused_key(error)
            kept = [override for override in left if key_of(override) != key]
            if len(kept) == len(left):
                raise ConfigError(explain(error, left)) from error
            left = kept


def with_value(key: str, value: str) -> str:
    """The override `key=value` in quotes, so that a value may hold `=`, `,` and spaces."""
    escaped = value.replace("'", r"\'")
    return f"{key}='{escaped}'"


def resolve(config: DictConfig) -> None:
    """Raise `ConfigError` when a required value is missing or an interpolation leads nowhere."""
    missing = sorted(_missing(OmegaConf.to_container(config, resolve=False)))
    if missing:
        wanted = " ".join(f"{key}=..." for key in missing)
        raise ConfigError(f"{' and '.join(missing)} must be given with these choices: add {wanted}")
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _missing(node: Any, prefix: str = "") -> set[str]:
    """The keys that nobody has given a value."""
    if isinstance(node, dict):
        return {key for name, value in node.items() for key in _missing(value, f"{prefix}.{name}".lstrip("."))}
    return {prefix} if node == "???" else set()


def instantiate(node: Any) -> Any:
    """Make the object a configuration node describes; only here, so that one guard covers all of them.

    The node itself stays as it is: Hydra resolves what it is given, and the keys it refers to, in place. Raises
    `ConfigError` that names the configuration key when a setting is out of its range or of the wrong type.
    """
    if not isinstance(node, DictConfig):
        return node
    key = node._get_full_key(None)
    own = OmegaConf.select(copy.deepcopy(node._get_root()), key) if key else copy.deepcopy(node)
    try:
        return hydra.utils.instantiate(own, _convert_="all")
    except InterpolationResolutionError as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except InstantiationException as error:
        raise _explained(node, error) from error
    except (TypeError, ValueError) as error:  # Hydra's own, about the node: what a target raises comes wrapped
        raise ConfigError(f"{_one_line(error)}") from error


def _explained(node: DictConfig, error: InstantiationException) -> BaseException:
    """What made an object impossible, as one sentence that names the key; or the error that its constructor raised."""
    cause, where = error.__cause__, _inner_key(error, "")
    if isinstance(cause, SettingError):
        return ConfigError(f"{source_key(node, f'{where}.{cause.name}')}={said(cause.value)}: must be {cause.allowed}")
    sentence = _one_line(cause or error).partition(" full_key: ")[0]
    if cause is None or str(error).startswith("Error locating target"):
        key = source_key(node, f"{where}._target_".lstrip("."))
        reason = cause if cause is None or cause.__cause__ is None else cause.__cause__
        return ConfigError(f"{key}: {sentence if reason is None else _one_line(reason)}")
    if isinstance(cause, TypeError | ImportError):
        return ConfigError(f"{source_key(node, where)}: {sentence}")
    return cause


def source_key(config: Any, key: str) -> str:
    """The key where a value was written: follows `${...}` from `key`, in the configuration that `config` is part of."""
    raw = OmegaConf.to_container(config._get_root(), resolve=False)
    for _ in range(10):
        parts = key.split(".")
        for end in range(1, len(parts) + 1):  # the first part that is an interpolation is replaced by its target
            value = at(raw, parts[:end])
            if isinstance(value, str) and value.startswith("${") and value.endswith("}") and value.count("${") == 1:
                key = ".".join([value[2:-1], *parts[end:]])
                break
        else:
            return key
    return key


def _hydra() -> AbstractContextManager[Any]:
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return hydra.initialize_config_dir(str(CONF), version_base="1.3")


@lru_cache(maxsize=64)
def _compose_once(overrides: tuple[str, ...]) -> DictConfig:
    """A configuration to compare with, never to change: the same for all runs of a sweep over values."""
    with _hydra():
        return hydra.compose("train", list(overrides))


def _without_experiment(choices: dict[str, str], overrides: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same choices of groups, but no experiment or preset: whatever is missing then was declared by no group.

    And the keys that the command line adds with a `+`, which are the user's own affair.
    """
    kept = {g: c for g, c in choices.items() if g not in SETS_OTHERS_KEYS and c is not None}
    options = (*(f"{group}={choice}" for group, choice in kept.items()), "experiment=none", "preset=none")
    return options, tuple(override for override in overrides if override.startswith("+"))


def _wrong_place(config: DictConfig) -> str | None:
    """What is wrong with the name of the run's folder, or with where the run is to go on from."""
    name, resume = config.name, config.resume
    if name is not None and not re.fullmatch(r"(?!\.)[^/\0-\x1f]{1,100}", str(name)):
        return f"name={said(name)}: must be the name of a folder: no slash, no dot in front, at most 100 characters"
    if resume not in RESUME and not os.path.exists(os.path.expanduser(resume)):  # Path.exists may raise
        return f"resume={said(resume)}: must be auto, never, or the path of a checkpoint or a run folder"
    return None


def _refuse_unread(config: DictConfig, plain: DictConfig) -> None:
    """Hydra refuses an unknown key on the command line, but not one that an experiment, recipe or preset sets.

    The value of a recipe or preset for a group whose option the command line has changed, by itself or through another
    group's option, falls away with their choice.
    """
    declared, owners = leaves(plain), declarations()
    unread = sorted(
        leaf
        for leaf in leaves(config) - declared
        if leaf.split(".")[0] not in ("overrides", "choices")
        and not any(d.startswith(f"{leaf}.") or leaf.startswith(f"{d}.") for d in declared)
    )
    chosen = _groups_changed(config) if unread else set()
    given = set(map(key_of, config.overrides))
    fallen = [k for k in unread if k not in given and {owner.split("=")[0] for owner in owners.get(k, [])} & chosen]
    for leaf in fallen:
        unread.remove(leaf)
        parent, _, name = leaf.rpartition(".")
        with open_dict(config):
            del OmegaConf.select(config, parent)[name]
    if unread:
        raise ConfigError(f"nothing reads {unread[0]}, set by {_setter(config, unread[0])}; {closest(unread[0])}")


def _setter(config: DictConfig, key: str) -> str:
    """Who has given a value to a key that no group declares: the user, the preset or the experiment with its recipe."""
    if key in map(key_of, config.overrides):
        return "the command line"
    preset, recipe = config.choices.preset, config.choices.get("recipe")
    content = OmegaConf.load(CONF / f"preset/{preset}.yaml")
    assert isinstance(content, DictConfig)
    if key in leaves(content):
        return f"preset={preset}"
    experiment = config.choices.experiment
    own = OmegaConf.load(CONF / f"experiment/{experiment}.yaml")
    assert isinstance(own, DictConfig)
    if recipe is None or key in leaves(own):
        return f"experiment={experiment}"
    return f"experiment={experiment} (conf/recipe/{recipe}.yaml)"


def _groups_changed(config: DictConfig) -> set[str]:
    """The groups that have another option than with the experiment, preset, stage, model and data alone; and data."""
    told = [o for o in config.overrides if key_of(o) in ("experiment", "preset", "stage", "model", "data")]
    with _hydra():
        before = hydra.compose("train", told, return_hydra_config=True).hydra.runtime.choices
    changed = {group for group, choice in config.choices.items() if before.get(group) != choice}
    return changed | ({"data"} & set(map(key_of, told)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _inner_key(error: InstantiationException, name: str) -> str:
    """The key of the node that could not be made, as Hydra's message gives it, and below it `name`."""
    _, found, key = str(error).rpartition("full_key: ")
    return ".".join(part for part in (key.strip() if found else "", name) if part)
