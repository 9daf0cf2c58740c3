"""One sentence for what Hydra says at length: which key or option was not found, and what there is instead."""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parents[2] / "conf"
SCHEMA = "base"  # the file of a group that its options share, and that is no option itself
SETS_OTHERS_KEYS = ("experiment", "recipe", "preset")  # groups that declare nothing of their own
WIRING = ("module", "datamodule", "tokenizer", "checks")  # nodes that pass on what other keys say


def explain(error: Exception, overrides: list[str]) -> str:
    """What is wrong with `overrides`, in one sentence."""
    misplaced = misplaced_preset(overrides)
    if misplaced is not None:
        return misplaced
    if isinstance(error, OverrideParseException):
        return _no_key_and_value(error.override)
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = [name for name in error.options if name != SCHEMA]
        return f"{group}={option}: there is no such option; the options are {', '.join(options)}"
    key = refused_key(error)
    if key is not None:
        return _unknown_key(key, overrides)
    return " ".join(str(error).split())


def unreadable(overrides: list[str]) -> str | None:
    """The sentence on the first override that Hydra would stumble over: no UTF-8, no key, no name of an option."""
    known = groups()
    for override in overrides:
        if override != override.encode("utf-8", "replace").decode("utf-8"):
            return f"{override.encode('utf-8', 'surrogateescape')!r} is not valid UTF-8"
        key = key_of(override)
        if "=" in override and not key:
            return _no_key_and_value(override)
        if key in known and not _names_an_option(override, options_of(key)):
            return f"{override[:200]}: there is no such option; the options are {', '.join(options_of(key))}"
    return None


def options_of(group: str) -> list[str]:
    """The options of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != SCHEMA)


def _names_an_option(override: str, options: list[str]) -> bool:
    """Whether a group's override names one of its options, or several for a sweep; Hydra says what cannot be read."""
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except HydraException:
        return True
    return parsed.is_delete() or parsed.is_sweep_override() or parsed.value() in (*options, SCHEMA)


def quoted(override: str) -> str:
    """The override as Hydra can read it: outside of quotes its grammar knows no letters but those of ASCII.

    A value with others is put into quotes, unless a sign in it says that it is more than a plain text.
    """
    key, equals, value = override.partition("=")
    if not equals or value.isascii() or re.search(r"""['"\[\]{}(),$\\\ud800-\udfff]""", value):
        return override
    return f"{key}='{value}'"


def repeated(overrides: list[str]) -> list[str]:
    """A sentence on each key or group that is given again: what was given first counts for nothing."""
    given: dict[str, str] = {}
    sentences = []
    for override in overrides:
        key = key_of(override)
        if key in given and given[key] != override:
            sentences.append(f"{given[key]} counts for nothing, as {override} comes after it")
        given[key] = override
    return sentences


def _no_key_and_value(override: str) -> str:
    return (
        f"{override!r} cannot be read as key=value; "
        f"a value with = , : or spaces needs quotes inside quotes: \"key='a=b'\""
    )


def misplaced_preset(overrides: list[str]) -> str | None:
    """The sentence on a preset that is asked for in another stage than PPO; None if there is none."""
    preset, stage = _given(overrides, "preset", "none"), _given(overrides, "stage", "ppo")
    if preset == "none" or stage == "ppo":
        return None
    return f"preset={preset}: a preset holds values of PPO, which stage={stage} does not read: remove it"


def refused_key(error: Exception) -> str | None:
    """The key or group that Hydra found no place for, if that is what its error says."""
    found = re.match(r"Could not override '([^'@]+)", str(error))
    return found[1] if found else None


def key_of(override: str) -> str:
    """The key or group of an override."""
    return re.split("[=@]", override.lstrip("+~"))[0]


def closest(key: str) -> str:
    """The keys and groups of a similar name, in words."""
    names = {*(name for name in declarations() if name.split(".")[0] not in WIRING), *groups()}
    same_end = [name for name in sorted(names) if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = [*same_end, *get_close_matches(key, sorted(names - set(same_end)), n=3, cutoff=0.75)][:4]
    if not near:
        return "`--cfg job` lists the keys there are"
    return f"close to it: {', '.join(near)}"


def groups() -> set[str]:
    """The names of the configuration groups."""
    return {str(path.relative_to(CONF)) for path in CONF.rglob("*") if path.is_dir()}


@lru_cache(maxsize=1)
def declarations() -> dict[str, list[str]]:
    """Each key of the files under `conf` -> the options (group=name) that declare it; "" stands for train.yaml."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONF.rglob("*.yaml")):
        group = str(path.relative_to(CONF).parent)
        if group in SETS_OTHERS_KEYS:
            continue
        content = OmegaConf.load(path)
        assert isinstance(content, DictConfig)
        content.pop("defaults", None)
        content.pop("hydra", None)
        for key in _keys(OmegaConf.to_container(content), package_of(path)):
            found.setdefault(key, []).append("" if group == "." else f"{group}={path.stem}")
    return found


def package_of(path: Path) -> str:
    """The node that a file's keys belong to, dotted; "" for the top."""
    package = re.search(r"^# @package (\S+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    group = str(path.relative_to(CONF).parent)
    name = package[1] if package else group
    return "" if name in ("_global_", ".") else name


def chosen_along(overrides: list[str]) -> list[str]:
    """What the chosen options choose for other groups, as overrides: `advantage=rloo` -> `value_loss=none`.

    Without them a preset or experiment, which Hydra asks first, would win over what the command line implies.
    """
    given, along, known = {key_of(override) for override in overrides}, [], groups() - {*SETS_OTHERS_KEYS}
    for group, _, option in (override.partition("=") for override in overrides):
        if group not in known or option not in (*options_of(group), SCHEMA):
            continue
        path = CONF / group / f"{option}.yaml"
        if not path.is_file():
            continue
        for entry in OmegaConf.select(OmegaConf.load(path), "defaults") or []:
            name, choice = next(iter(entry.items())) if isinstance(entry, DictConfig) else ("", None)
            other = str(name).removeprefix("override /")
            if other != name and other not in given:
                along.append(f"{other}={choice}")
    return along


def _unknown_key(key: str, overrides: list[str]) -> str:
    """Say where the key belongs, or which keys are close to it."""
    given = next((text for text in overrides if key_of(text) == key), key)
    stage = _given(overrides, "stage", "ppo")
    stages = {path.stem: _groups_of(path) for path in sorted((CONF / "stage").glob("*.yaml"))}
    owners = [f"{key}=..."] if key in groups() else declarations().get(key, [])
    of_stages = sorted({name for owner in owners for name in stages if _belongs(owner, name, stages)})
    if owners and of_stages and stage not in of_stages:
        return (
            f"{given}: stage={stage} does not read {key}, only {_either([f'stage={name}' for name in of_stages])} does"
        )
    if owners and key not in groups():
        return f"{given}: nothing reads {key} here, it belongs to {_either(owners)}"
    return f"{given}: there is no key {key}; {closest(key)}"


def _given(overrides: list[str], group: str, default: str) -> str:
    """The option of a group that the overrides choose."""
    return next((text.partition("=")[2] for text in overrides if key_of(text) == group), default)


def _belongs(owner: str, stage: str, stages: dict[str, set[str]]) -> bool:
    """Whether a stage takes the option `owner`, through its own defaults list or as itself."""
    group, _, option = owner.partition("=")
    if group == "stage":
        return option == stage
    return group in stages[stage]


def _groups_of(stage: Path) -> set[str]:
    """The groups that a stage's file pulls in."""
    return {str(name).lstrip("/") for entry in OmegaConf.load(stage).defaults if entry != "_self_" for name in entry}


def _keys(node: Any, prefix: str) -> set[str]:
    """Dotted names of all keys of a nested dictionary, inner nodes too."""
    if not isinstance(node, dict):
        return set()
    names = {f"{prefix}.{key}" if prefix else str(key): value for key, value in node.items()}
    own = {name: value for name, value in names.items() if not name.split(".")[-1].startswith("_")}
    return {key for name, value in own.items() for key in {name, *_keys(value, name)}}


def _either(names: list[str]) -> str:
    return " or ".join(names)
