"""The objects that options choose: `_target_` nodes of the configuration, instantiated by Hydra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException

from src.config.errors import format_value
from src.config.schema import Node
from src.errors import ConfigError, SettingError


def instantiate(node: Node | Mapping[str, Any] | None, key: str, **arguments: Any) -> Any:
    """The object of a node, or its factory if the node is partial; None for None.

    Raises `ConfigError` with the key when the target cannot be found or refuses a setting.
    """
    if node is None:
        return None
    content = node.model_dump(by_alias=True, exclude_unset=True) if isinstance(node, Node) else node
    if not isinstance(content, Mapping) or "_target_" not in content:
        raise ConfigError(f"{key}: needs a _target_, the dotted path of its class")
    try:
        return hydra.utils.instantiate(dict(content), _convert_="all", **arguments)
    except InstantiationException as error:
        raise _explained(key, error) from error
    except (TypeError, ValueError) as error:  # of Hydra, about the node; errors of the target are wrapped
        raise ConfigError(f"{key}: {_one_line(error)}") from error


def _explained(key: str, error: InstantiationException) -> BaseException:
    """Why an object could not be made, as one sentence with the key; or the error that its constructor raised."""
    cause = error.__cause__
    _, found, inner = str(error).rpartition("full_key: ")
    where = f"{key}.{inner.strip()}".rstrip(".") if found else key
    if isinstance(cause, SettingError):
        # a setting of PPO is passed on to the object: ppo.clip to ppo.policy_loss
        owner = where.rpartition(".")[0] if where.startswith("ppo.") else where
        return ConfigError(f"{owner}.{cause.name}={format_value(cause.value)}: must be {cause.allowed}")
    if cause is None or str(error).startswith("Error locating target"):
        reason = cause if cause is None or cause.__cause__ is None else cause.__cause__
        return ConfigError(f"{_target_key(where)}: {_one_line(reason or error).partition(' full_key: ')[0]}")
    if isinstance(cause, TypeError | ImportError):
        return ConfigError(f"{where}: {_one_line(cause)}")
    return cause


def _target_key(where: str) -> str:
    """The key of a target: for a function reward `reward.target`."""
    return where.removesuffix(".function") + ".target" if where.endswith(".function") else f"{where}._target_"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
