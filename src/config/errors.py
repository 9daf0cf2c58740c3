"""One sentence for what Hydra and pydantic say at length: which key or value is wrong, and how to mend it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache, reduce
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from src.config.files import brings, groups, key_of, options
from src.config.schema import MEANT, OPEN, OPTIONS, PLAIN, QUOTES, RUNS, WHY_NOT
from src.errors import NO_SECRETS, ConfigError, without_secrets


def readable(overrides: list[str], sweep: bool = False) -> list[str]:
    """The overrides in a form that Hydra reads. Raises `ConfigError` for one that it, or a single run, cannot read."""
    made = [quoted(override) for override in overrides]
    found = (_unreadable(override, sweep, after) for override, after in zip(made, [*made[1:], ""], strict=False))
    for sentence in filter(None, found):
        raise ConfigError(sentence)
    return made


def _unreadable(override: str, sweep: bool, after: str = "") -> str | None:
    """What keeps Hydra, or a single run, from reading an override; the value of a key alone may be the word after."""
    if override in {*declared(), *groups()}:
        value, given = ("VALUE", override) if "=" in after or not after else (after, f"{override} {after}")
        return f"{given}: write {override}={value}"
    if override != override.encode("utf-8", "replace").decode("utf-8"):
        return f"{override.encode('utf-8', 'surrogateescape')!r} is not valid UTF-8"
    key, given = key_of(override), override[:200]
    if without_secrets(override) != override:
        return f"{key}: {NO_SECRETS}"
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except HydraException:
        key = ""
    if not key:
        return f"{given!r} cannot be read as key=value; {QUOTES}"
    several, is_group = parsed.is_sweep_override(), key in groups()
    if override[0] in "+~" and (is_group or not any(f"{key}.".startswith(f"{node}.") for node in OPEN)):
        hint = f"{given}: write {key}=VALUE" if is_group or key in declared() else unknown_key(key, given)
        return f"{hint}; + and ~ add and remove keys of {', '.join(OPEN)} alone"
    if override[0] == "~" and key in declared():
        return f"{given}: every run reads {key}, so it cannot be removed"
    if not sweep and (several or key.startswith("hydra")):
        return f"{given}: only a sweep (-m) reads it; {QUOTES}"
    chosen: Any = parsed.value()
    wanted = chosen if key == "logger" and isinstance(chosen, list) else [chosen]
    if is_group and not several and any(name not in options(key) for name in wanted):
        near = get_close_matches(str(wanted[-1]), options(key))
        hint = f"close to it: {', '.join(near)}; " if near else ""
        return f"{given}: there is no such option; {hint}the options are {', '.join(options(key))}"
    return unknown_key(key, given) if key in WHY_NOT else None


def explain(error: Exception, overrides: list[str]) -> str:
    """What Hydra found wrong, in one sentence."""
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    found = re.match(r"(?:In '([\w./-]+)': )?Could not (?:override|find|load) '([^'@]+)", str(error))
    if found is None:
        return re.sub(r".* '(.+)' does not exist\.", r"~\1: there is no key \1 to remove", " ".join(str(error).split()))
    setter, key = (found[1] or "").replace("/", "="), found[2]
    if isinstance(error, MissingConfigException):
        return str(_unreadable(key.replace("/", "="), sweep=True))
    given = next((text for text in overrides if key_of(text) == key), key)
    if key in brings():
        (parent, with_it), *_ = brings()[key].items()
        chooses = f"{setter} chooses {key}, which is" if "=" in setter else f"{given}: {key} is"
        return f"{chooses} part of {parent}={' or '.join(with_it)} alone: choose one of these, or leave {key} out"
    unknown = str(getattr(error.__cause__, "full_key", ""))  # within a value {a: 1} it is longer than the key
    key = unknown if unknown.startswith(f"{key}.") else key
    if key in declared() and not owners_of(key):
        return f"{given}: {unknown.rpartition('.')[0]} has no keys here: it is null or follows another key"
    return unknown_key(key, given)


def unknown_key(key: str, given: str) -> str:
    """Where the key belongs, what is there instead, or which keys have a similar name."""
    if key in WHY_NOT:
        return f"{given}: is not supported; {WHY_NOT[key]}"
    if key in MEANT:
        return f"{given}: there is no key {key}; use {MEANT[key]}"
    if owners_of(key):
        return f"{given}: nothing reads {key} here, it belongs to {' or '.join(owners_of(key))}"
    node = next((node for node in OPEN if key.startswith(f"{node}.") and given.startswith(node)), None)
    added = f"; + adds one to {node}: +{given}" if node else ""
    return f"{given}: there is no key {key}; {closest(key)}{added}"


def explain_validation(error: ValidationError, plain: dict[str, Any], overrides: list[str]) -> str:
    """The first wrong value, one that was given before one that follows from it: key, value, and what it must be."""
    given = {key_of(override) for override in overrides}
    found = [(_key_of(wrong, plain), wrong) for wrong in error.errors()]
    key, wrong = min(found, key=lambda pair: pair[0] not in given)
    if wrong["type"] == "missing":
        return f"{key} must be given"
    if wrong["type"] == "extra_forbidden":
        return unknown_key(key, f"{key}={format_value(wrong['input'])}")
    rules = dict.fromkeys(_rule(other) for place, other in found if place == key)
    null = ", or null" if type(None) in get_args(declared().get(key, [None])[0]) else ""
    value = reduce(lambda node, part: node[part], key.split("."), plain)
    return f"{key}={format_value(value)}: must be {' or '.join(rules)}{null}"


def _key_of(wrong: ErrorDetails, node: Any) -> str:
    """The key that is wrong in a configuration: its place without the branches of a union and items of a list."""
    key = []
    for number, part in enumerate(wrong["loc"], start=1):
        missing = wrong["type"] == "missing" and number == len(wrong["loc"])
        if isinstance(node, dict) and (part in node or missing):
            key.append(str(part))
            node = node.get(part)
    return ".".join(key)


def _rule(wrong: ErrorDetails) -> str:
    """What a value must be."""
    rule = reduce(lambda text, pair: re.sub(pair[0], pair[1], text), PLAIN.items(), wrong["msg"])
    return f"a list in which each is {rule}" if isinstance(wrong["loc"][-1], int) else rule


@cache
def declared() -> dict[str, tuple[Any, list[str]]]:
    """Every key that some stage or option declares: its type, and the options (group=option) that alone declare it."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for run in RUNS.values():
        found |= {key: (kind, []) for key, kind in _keys("", run) if key not in ("overrides", "choices")}
    for group, (node, classes) in OPTIONS.items():
        for option, model in classes.items():
            for key, kind in _keys(node, model):
                found.setdefault(key, (kind, []))[1].append(f"{group}={option}")
    return found


def owners_of(key: str) -> list[str]:
    """The options (group=option) that alone declare a key."""
    return declared()[key][1] if key in declared() else []


def _keys(node: str, kind: Any) -> Iterator[tuple[str, Any]]:
    """Key and type of everything that a declared type holds, at any depth below `node`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            key = f"{node}.{field.alias or name}".lstrip(".")
            yield key, field.annotation
            yield from _keys(key, field.annotation)
    elif get_origin(kind) in (Union, UnionType, Annotated):
        for inside in get_args(kind):
            yield from _keys(node, inside)


def closest(key: str) -> str:
    """The keys and groups of a similar name, in words."""
    names = {*(name for name in declared() if "._" not in name), *groups()}
    same_end = [name for name in sorted(names) if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = [*same_end, *get_close_matches(key, sorted(names - set(same_end)), n=3, cutoff=0.75)][:4]
    return f"close to it: {', '.join(near)}" if near else "`--help` lists the keys"


def quoted(override: str) -> str:
    """The override as Hydra can read it: letters beyond ASCII and a ~ in front want quotes, unless there are some."""
    key, equals, value = override.partition("=")
    plain = value.isascii() and not value.startswith("~")
    if not equals or plain or re.search(r"""['"\[\]{}(),$\\\ud800-\udfff]""", value):
        return override
    return f"{key}='{value}'"


def repeated(overrides: list[str]) -> list[str]:
    """A sentence on each override that a later one of the same key or group replaces."""
    last = {key_of(override): override for override in overrides}
    return [f"{o} is overridden by {last[key_of(o)]}" for o in overrides if last[key_of(o)] != o]


def format_value(value: Any) -> str:
    """A value as it is written in YAML, cut where it is long."""
    text = str(value).lower().replace("none", "null") if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
