"""What kind of value a configuration key takes, told by the value that its own group file gives it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

FREE = ("trainer", "logger", "overrides", "choices")  # Lightning's own arguments take values of several types
NULLABLE = re.compile(r"model\.(lora|scratch)|callbacks\.\w+")  # nodes that may be null: there is none of it then
NODES_OR_NULL = ("pairs", "lora")  # keys that are null in their own file and may be a group of keys
NUMBERS_OR_NULL = ("layers", "max_prompt_tokens", "max_response_tokens")  # those that may be a number, as all of ppo
NEVER_NULL = ("log_dir", "resume", "stage", "_target_")  # texts that are always there
PLAIN_OR_NULL = ("name", "run_dir")  # and those that become a text of themselves
UNBOUNDED = ("max_grad_norm",)  # infinite where nothing is to be clipped
LARGEST = 2**63 - 1  # whole numbers beyond it fit into no tensor, and into no length


def wrong_value(config: DictConfig, declared: DictConfig) -> str | None:
    """The sentence on the first key of `config` with a value of another kind than `declared` says; None if all fit.

    A key whose own value is a number, a truth value, a text, a list or a group of keys takes no other kind of value,
    and numbers are finite. `${...}` counts as what it comes to where it was not written by the group file itself.
    """
    raw, own = (OmegaConf.to_container(c, resolve=False) for c in (config, declared))
    for key in sorted(_keys(declared)):
        *parents, name = key.split(".")
        parent, default = at(raw, parents), at(own, key.split("."))
        if key.split(".")[0] in FREE or not isinstance(parent, dict):
            continue  # Lightning's business, or below a node that is null
        value = parent.get(name)
        if is_reference(value):
            if value == default or not _leads_somewhere(config, key):
                continue  # the key that it refers to is looked at itself, and a wrong reference is said elsewhere
            value = _value(config, key)
        example = None if is_reference(default) and value is None else _value(declared, key)
        wanted = _wanted(key, value, default if not is_reference(default) else example)
        if wanted:
            return f"{key}={said(value)}: must be {wanted}"
    return None


def leaves(config: DictConfig) -> set[str]:
    """Dotted names of all keys that hold a plain value."""

    def walk(node: Any, prefix: str) -> set[str]:
        if not isinstance(node, dict):
            return {prefix}
        return {leaf for key, value in node.items() for leaf in walk(value, f"{prefix}.{key}" if prefix else str(key))}

    return walk(OmegaConf.to_container(config, resolve=False), "")


def at(node: Any, path: list[str]) -> Any:
    """The value at a path of keys in nested dictionaries; None where there is none."""
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node


def is_reference(value: Any) -> bool:
    """Whether a raw value holds `${...}`."""
    return isinstance(value, str) and "${" in value


def said(value: Any) -> str:
    """A value as it is written in YAML, not as Python prints it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _keys(declared: DictConfig) -> Iterator[str]:
    """All keys, inner nodes too."""
    yield from {".".join(leaf.split(".")[:n]) for leaf in leaves(declared) for n in range(1, leaf.count(".") + 2)}


def _wanted(key: str, value: Any, default: Any) -> str:
    """What the value must be, in words; "" where it is that."""
    if isinstance(default, dict):
        nullable = value is None and NULLABLE.fullmatch(key)
        return "" if isinstance(value, dict) or nullable else "a group of keys"
    if isinstance(value, int | float) and not isinstance(value, bool) and (wrong := _wrong_number(key, value)):
        return wrong
    if default is None:
        return _wanted_or_null(key, value)
    if isinstance(default, list):
        return "" if isinstance(value, list) else "a list"
    if isinstance(default, str):
        return _wanted_text(key, value, default)
    kind, like = _kind(default), f", like {default}".lower()
    same = _kind(value) == kind or (_kind(value), kind) == ("a whole number", "a number")
    return "" if same or not kind else kind + like


def _wanted_or_null(key: str, value: Any) -> str:
    """The same, for a key that is null in its own file."""
    group, _, name = key.rpartition(".")
    if value is None or value == "???":
        return ""
    if group == "ppo" or name in NUMBERS_OR_NULL:
        return "" if _kind(value) in ("a number", "a whole number") else "a number or null"
    if name in NODES_OR_NULL:
        return "" if isinstance(value, dict) else "a group of keys or null"
    if key in PLAIN_OR_NULL:
        return "" if isinstance(value, str | int | float) else "a text or null"
    return "" if isinstance(value, str) else "a text or null (a number that is a name needs quotes inside quotes)"


def _wanted_text(key: str, value: Any, default: str) -> str:
    """The same, for a key that is a text in its own file, or that must be given (`???`)."""
    if isinstance(value, str) or (value is None and not key.endswith(NEVER_NULL)):
        return ""  # many texts may be null, and those that may not are refused by their readers
    if default == "???" and isinstance(value, list):
        return ""
    if key.endswith(".targets"):
        return "" if isinstance(value, list) and all(isinstance(t, str) for t in value) else "a text or a list of texts"
    return "a text" + (f", like {default}" if default != "???" else "")


def _wrong_number(key: str, value: float) -> str:
    if math.isnan(value) or (math.isinf(value) and not key.endswith(UNBOUNDED)):
        return "a finite number"
    return "smaller than 2^63" if isinstance(value, int) and abs(value) > LARGEST else ""


def _leads_somewhere(config: DictConfig, key: str) -> bool:
    try:
        OmegaConf.select(config, key, throw_on_missing=True)
    except OmegaConfBaseException:
        return False
    return True


def _value(config: DictConfig, key: str) -> Any:
    """What a key comes to, in plain types; None where a value is still missing."""
    try:
        value = OmegaConf.select(config, key)
    except InterpolationToMissingValueError:
        return None
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value


def _kind(value: Any) -> str:
    """The kinds of value that are told apart, in words; "" for all others."""
    if isinstance(value, bool):
        return "true or false"
    return {int: "a whole number", float: "a number"}.get(type(value), "")
