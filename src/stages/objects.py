"""The objects that options choose: `_target_` nodes of the configuration, instantiated by Hydra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException

from src.config.errors import format_value
from src.config.schema import Node
from src.errors import ConfigError, SettingError
from src.stages.targets import why_not_callable, why_not_found


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
        raise _explained(key, content, error) from error
    except SystemExit as error:  # of a module that runs a program when it is imported
        raise ConfigError(f"{key}: its target ended the program by sys.exit({error.code!r})") from error
    except (TypeError, ValueError) as error:  # of Hydra, about the node; errors of the target are wrapped
        raise ConfigError(f"{key}: {_one_line(error)}") from error


def _explained(key: str, content: Mapping[str, Any], error: InstantiationException) -> BaseException:
    """Why an object could not be made, as one sentence with the key; or the error that its constructor raised."""
    cause = error.__cause__
    _, found, inner = str(error).rpartition("full_key: ")
    where = f"{key}.{inner.strip()}".rstrip(".") if found else key
    if isinstance(cause, SettingError):
        # a setting of PPO is passed on to the object: ppo.clip to ppo.policy_loss
        owner = where.rpartition(".")[0] if where.startswith("ppo.") else where
        return ConfigError(f"{owner}.{cause.name}={format_value(cause.value)}: must be {cause.allowed}")
    if cause is None or str(error).startswith("Error locating target"):
        return ConfigError(_bad_target(_target_key(where), _target_of(content, inner.strip() if found else ""), error))
    if isinstance(cause, TypeError | ImportError):
        return ConfigError(f"{where}: {_one_line(cause)}")
    return cause


def _bad_target(key: str, target: str, error: InstantiationException) -> str:
    """Why a target cannot be used."""
    cause = error.__cause__
    if str(error).startswith("Error locating target") and cause is not None:
        return f"{key}={target}: {why_not_found(target, cause.__cause__ or cause)}"
    if str(error).startswith("Expected a callable target"):
        return f"{key}={target}: {why_not_callable(target, 'function' if key.endswith('.target') else 'class')}"
    return f"{key}: {_one_line(error).partition(' full_key: ')[0]}"


def _target_of(content: Mapping[str, Any], place: str) -> str:
    """The target of the node at a dotted place within another; empty for one in a list, whose place Hydra garbles."""
    node: Any = content
    for name in filter(None, place.split(".")):
        node = node.get(name) if isinstance(node, Mapping) else None
    return str(node["_target_"]) if isinstance(node, Mapping) else ""


def _target_key(where: str) -> str:
    """The key of a target: for a function reward `reward.target`."""
    return where.removesuffix(".function") + ".target" if where.endswith(".function") else f"{where}._target_"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
