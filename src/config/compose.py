"""Overrides in, a typed configuration out: composed once by Hydra, checked once by pydantic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import reduce
from typing import Any, get_args

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from src.config.errors import explain, explain_validation, format_value, owners_of, readable, unknown_key
from src.config.files import CONF, Source, brings, key_of, leaves, sources
from src.config.schema import OPTIONS, RUNS, Node, Run, run_type
from src.config.validate import wrong
from src.errors import ConfigError

NOT_SETTINGS = ("overrides", "choices", "run_dir", "log_dir", "name", "resume", "allow_config_change")


def compose(overrides: list[str]) -> Run:
    """The configuration that `python -m src.train OVERRIDES` runs with.

    Raises `ConfigError`: a key or option that does not exist or that the stage does not read, a value of a wrong type
    or out of its range, a required value that is missing, choices that exclude each other.
    """
    overrides = readable(overrides)
    started = GlobalHydra.instance().is_initialized()  # by a sweep
    try:
        with nullcontext() if started else hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose("train", overrides, return_hydra_config=True)
            choices = dict(config.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, overrides)) from error
    return typed(config, choices, overrides)


def typed(config: DictConfig, choices: Mapping[str, str | None], overrides: list[str]) -> Run:
    """The stage's part of a composed configuration, checked. Raises `ConfigError`."""
    chosen = {group: option for group, option in choices.items() if "/" not in group and option}
    stage = _resolved(config, ["stage"])["stage"]
    if stage not in list(RUNS):
        raise ConfigError(f"stage={format_value(stage)}: must be {' or '.join(RUNS)}")
    for override in overrides:
        readers = _readers(key_of(override))
        if stage not in readers:
            only = " and ".join(f"stage={name}" for name in readers)
            raise ConfigError(f"{override}: stage={stage} does not read {key_of(override)}, only {only} does")
    kind = run_type(stage, chosen)
    plain = _resolved(config, [str(key) for key in config if key in kind.model_fields])
    _drop_replaced(plain, kind, sources(chosen, overrides), overrides)
    try:
        run = kind.model_validate(plain | {"overrides": overrides, "choices": chosen})
    except ValidationError as error:
        raise ConfigError(explain_validation(error, plain, overrides)) from error
    for sentence in wrong(run):
        raise ConfigError(sentence)
    return run


def restored(content: dict[str, Any]) -> Run:
    """The configuration that `Run.plain` gave. Raises `ValueError` for any other content."""
    return run_type(content["stage"], content["choices"]).model_validate(content)


def settings_hash(run: Run, *others: str) -> str:
    """SHA-256 of what a run is asked to do; where its folder lies and what it is called (and `others`) do not count."""
    settings = {key: value for key, value in run.plain().items() if key not in (*NOT_SETTINGS, *others)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def readable_by(stage: str, overrides: Iterable[str]) -> list[str]:
    """Those of the overrides that the stage reads."""
    return [override for override in overrides if stage in _readers(key_of(override))]


def with_value(key: str, value: str) -> str:
    """The override `key=value` in quotes, so that a value may hold `=`, `,` and spaces."""
    escaped = value.replace("'", r"\'")
    return f"{key}='{escaped}'"


def _readers(key: str) -> list[str]:
    """The stages that read a key or group; all of them where none declares it, as it belongs to the run as such."""
    node = "ppo" if key == "preset" else OPTIONS[key][0] if key in OPTIONS else key.split(".")[0]
    return [stage for stage, run in RUNS.items() if node in run.model_fields] or list(RUNS)


def _resolved(config: DictConfig, nodes: list[str]) -> dict[str, Any]:
    """The nodes without `${...}`. Raises `ConfigError` for a missing value or an interpolation that leads nowhere."""
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    missing = sorted(key for node in nodes for key, value in leaves(raw[node], node) if value == "???")
    if missing:
        wanted = " ".join(f"{key}=..." for key in missing)
        raise ConfigError(f"{' and '.join(missing)} must be given with these choices: add {wanted}")
    try:
        resolved = OmegaConf.to_container(OmegaConf.masked_copy(config, nodes), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, [])) from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _drop_replaced(plain: dict[str, Any], kind: type[Run], found: list[Source], overrides: list[str]) -> None:
    """Drop a value of the model, experiment or preset for an option that a stronger source has replaced.

    Raises `ConfigError` for any other key that no chosen option declares.
    """
    for *above, name in list(_undeclared(plain, kind)):
        key = ".".join([*above, name])
        owners = {owner.partition("=")[0] for owner in owners_of(key)}
        owners |= {parent for owner in owners for parent in brings().get(owner, {})}
        setters = [i for i, source in enumerate(found) if any(f"{k}.".startswith(f"{key}.") for k in source.keys)]
        if not setters or not any(owners & source.groups for source in found[setters[-1] + 1 :]):
            setter = f"{key}, set by {found[setters[-1]].name if setters else 'its group'}"
            raise ConfigError(unknown_key(key, next((o for o in overrides if key_of(o) == key), setter)))
        del reduce(dict.__getitem__, above, plain)[name]


def _undeclared(content: Any, kind: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The place of each key that a declared type does not have, at any depth."""
    types = [t for t in (kind, *get_args(kind)) if isinstance(t, type) and issubclass(t, Node)]
    if len(types) != 1 or not isinstance(content, dict):
        return
    fields = {field.alias or name: field.annotation for name, field in types[0].model_fields.items()}
    for name, value in content.items():
        if name in fields:
            yield from _undeclared(value, fields[name], (*above, name))
        elif types[0].model_config["extra"] == "forbid":
            yield (*above, name)
