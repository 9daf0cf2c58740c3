"""What a user can mend: one class for each place where it goes wrong, all under one base.

The message is one sentence: what is wrong, where, and how to mend it.
"""

from __future__ import annotations

import errno
import re

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says when there is no room
NO_SECRETS = (
    "a password or key in an address would be stored with the run; put it into the environment variable that "
    "reward.token_variable names (REWARD_TOKEN): a token, or a whole header as 'Basic ...'"
)
SECRETS = (  # in an address: a name and password, the value of a parameter that is a key
    re.compile(r"(?<=://)[^/?#\s'\"]+(?=@)"),
    re.compile(r"(?<=[?&])((?:[\w.-]*[_.-])?(?:api)?(?:key|token|secret|password|sig|auth)=)[^&\s'\"]+", re.I),
)


class UserError(Exception):
    """Something a user can mend; commands print the message alone and exit with code 2."""


class ConfigError(UserError, ValueError):
    """The configuration is wrong: a key, its value, or two choices that exclude each other."""


class SettingError(UserError, ValueError):
    """A setting is out of its range; carries the setting's name, its value and the allowed range in words."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} must be {allowed}, but is {value!r}")
        self.name, self.value, self.allowed = name, value, allowed


class DataError(UserError, ValueError):
    """A data file cannot be used; the message names file, line and column."""


class ModelError(UserError, RuntimeError):
    """A model or tokenizer cannot be loaded or used as asked."""


class RewardError(UserError, RuntimeError):
    """A reward cannot score a text; the message names the reward, the text and what came back."""


class EngineError(UserError, RuntimeError):
    """A rollout engine cannot be started or reached, or what it answers cannot be used."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written, read or resumed from."""


class NonFiniteError(UserError, RuntimeError):
    """A number that the model computed is NaN or infinite, and the run may not skip it."""


class RankError(UserError, RuntimeError):
    """One process of a distributed run failed, and the run with it."""


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise `SettingError` unless `ok`."""
    if not ok:
        raise SettingError(name, value, allowed)


def without_secrets(text: str) -> str:
    """The text with `...` for every name, password and key in an address."""
    names, keys = SECRETS
    return keys.sub(r"\1...", names.sub("...", text))
