"""What the files under `conf/` say: options, comments, and who sets a value or chooses an option."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf"
HIDDEN = "base"  # the file that a group's options share; no option itself
KEY = re.compile(r"^( *)(\w+): *([^#\n]*?) *(?:# (.*))?$", re.MULTILINE)
CHOICE = re.compile(r"^  - /?(\w+): +([\w.-]+) *(?:# (.*))?$", re.MULTILINE)


class Source(NamedTuple):
    """A file or the command line: the keys that it sets and the groups of which it chooses an option."""

    name: str
    keys: set[str]
    groups: set[str]


def groups() -> list[str]:
    """The configuration groups."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "stages")


def options(group: str) -> list[str]:
    """The options of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != HIDDEN)


@cache
def read(path: Path) -> Mapping[str, Any]:
    """A file's content as it is written; empty where there is none."""
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


@cache
def brings() -> dict[str, dict[str, list[str]]]:
    """Group -> the group whose options bring it along -> those options: value_loss -> advantage -> [gae, ...]."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        for entry in read(path).get("defaults", []):
            for name in entry if isinstance(entry, dict) else ():
                if name.startswith("/"):
                    found.setdefault(name[1:], {}).setdefault(path.parent.name, []).append(path.stem)
    return found


def sources(choices: Mapping[str, str], overrides: list[str]) -> list[Source]:
    """Who sets values over those of the groups, from the weakest to the strongest: model, experiment, preset, user."""
    files = [source for group in ("model", "experiment", "preset") for source in _sources(group, choices.get(group))]
    given = {key_of(override) for override in overrides}
    return [*files, Source("the command line", given, given & set(groups()))]


def key_of(override: str) -> str:
    """The key or group of an override."""
    return re.split("[=@]", override.lstrip("+~"))[0]


def headline(path: Path) -> str:
    """What the first comment of a file says of it, up to the first line that ends a sentence."""
    found = re.match(r"(?:# @package.*\n)?((?:# .*\n)*?# .*\.)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1][2:].replace("\n# ", " ") if found else ""


def chosen_groups(path: Path) -> dict[str, str]:
    """The groups of a file's defaults list, each with its comment."""
    return {found[1]: found[3] or "" for found in CHOICE.finditer(path.read_text(encoding="utf-8"))}


def commented_keys(path: Path) -> Iterator[tuple[str, str, str]]:
    """Dotted key, value and comment of each key that has both on its line; without Hydra's own."""
    text = path.read_text(encoding="utf-8").split("\nhydra:")[0] if path.exists() else ""
    package = re.search(r"^# @package (\S+)", text, flags=re.MULTILINE)
    node = package[1].replace("_global_", "") if package else path.parent.name if path.parent != CONF else ""
    above: list[tuple[int, str]] = [(-1, part) for part in node.split(".") if part]
    for indent, name, value, comment in KEY.findall(text):
        while above and above[-1][0] >= len(indent):
            above.pop()
        above.append((len(indent), name))
        if value and comment and not name.startswith("_"):
            yield ".".join(part for _, part in above), value, comment


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is no node with keys; an empty node is a value."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _sources(group: str, option: str | None) -> list[Source]:
    """An option's file, after those that it builds on."""
    content = dict(read(CONF / group / f"{option}.yaml"))
    entries = content.pop("defaults", [])
    above = [entry.split("@")[0] for entry in entries if isinstance(entry, str) and entry != "_self_"]
    chosen = {str(name).removeprefix("override /") for entry in entries if isinstance(entry, dict) for name in entry}
    own = Source(f"{group}={option}", {key for key, _ in leaves(content)}, chosen)
    return [*(source for name in above for source in _sources(group, name)), own]
