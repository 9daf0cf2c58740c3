"""What somebody else's run folder may make in chat, evaluate and export: objects of a white list, more by consent.

Consent comes from the command line of the call, never from the folder: `--trust-run`, `model.trust_remote_code=true`,
or the name of the code itself (`reward=function reward.target=...`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from src.config.files import CONF, key_of, read
from src.config.schema import Run
from src.errors import ConfigError

# these send prompts, and what an environment variable holds, to an address that the folder names
ASKS_OTHERS = ("src.rewards.http.", "src.rewards.judge.")
UNUSED = ("callbacks", "logger")  # what trains or logs alone is never made by another command
MADE_THERE = ("src.loggers.", "src.callbacks.")  # so it is refused in any other place
ELSEWHERE = ("ppo.early_stop.",)
REMOTE_CODE = "model.trust_remote_code"
HELP = "run what the run's configuration names and this project lacks; only for a folder that you trust"


@cache
def white_list() -> frozenset[str]:
    """The targets that this checkout's option files name (`conf/`), without those that ask others."""
    named = {target for file in CONF.rglob("*.yaml") for _, target in targets_in(read(file))}
    return frozenset(target for target in named if not target.startswith(("${", *ASKS_OTHERS)))


def targets_in(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Place and value of every `_target_` in a configuration, at any depth, in lists too."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            inside = f"{place}.{key}".lstrip(".")
            yield from [(inside, str(value))] if key == "_target_" else targets_in(value, inside)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for number, value in enumerate(node):
            yield from targets_in(value, f"{place}.{number}")


def without_consent(run: Run, arguments: Sequence[str], trusted: bool) -> Run:
    """A folder's configuration without what other commands never use, and without a consent that it gives itself.

    `arguments` are this call's own; `trusted` leaves `model.trust_remote_code` as it is in the folder.
    """
    dropped = UNUSED if trusted else (*UNUSED, REMOTE_CODE)
    overrides = [o for o in run.overrides if not f"{key_of(o)}.".startswith(tuple(f"{key}." for key in dropped))]
    remote = f"{REMOTE_CODE}=true" in arguments or (trusted and run.model.trust_remote_code)
    declared = run.callbacks.model_dump(include=set(type(run.callbacks).model_fields))
    return run.model_copy(
        update={
            "overrides": overrides,
            "callbacks": type(run.callbacks).model_validate(declared),
            "logger": type(run.logger).model_validate({}),
            "model": run.model.model_copy(update={"trust_remote_code": remote}),
        }
    )


def refuse_unknown(run: Run, given: str, arguments: Sequence[str]) -> None:
    """Raise `ConfigError` for a target that is neither on the white list nor named or chosen by the `arguments`."""
    chosen = {key_of(argument) for argument in arguments}
    words = {word for argument in arguments for word in re.findall(r"[\w.]+", argument)}
    for place, target in targets_in(run.plain()):
        node = place.partition(".")[0]
        misplaced = target.startswith(MADE_THERE) and node not in UNUSED and not place.startswith(ELSEWHERE)
        if (target in white_list() and not misplaced) or target in words or node in chosen:
            continue
        what = "asks another machine" if target.startswith(ASKS_OTHERS) else "does not belong to this project"
        instead = f", or choose another, as {node}=vader" if node in ("reward", "gold_reward") else ""
        raise ConfigError(
            f"{given}: its configuration names {place}={target}, which {what}: add --trust-run if you trust the folder"
            f"{instead}"
        )
