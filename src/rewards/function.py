"""Any Python function as the reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from src.errors import ConfigError, require
from src.types import AnyReward, PartedReward, Reward, RolloutReward, TokenReward

PARAMETERS = "(prompts, responses, metadata)"


class FunctionReward:
    """r(x, y) = function(prompts, responses, metadata), one number per response, in the order given.

    `metadata` holds the other columns of each prompt's data row and `finished`.
    """

    def __init__(self, target: str, function: Callable[..., Tensor | Sequence[float]]) -> None:
        require(takes_texts(function), "target", target, f"a function of {PARAMETERS}")
        is_async = any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004
        require(not is_async, "target", target, "a plain function: an async one is not waited for")
        self.target, self.function = target, function  # its dotted path, its name in messages

    def score(
        self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor | Sequence[float]:
        """The function's scores."""
        return self.function(prompts, responses, metadata)


def as_reward(reward: Any, name: str = "reward") -> AnyReward:
    """A reward as it is, and a function as a reward. Raises `ConfigError` with the argument's `name` for others."""
    kind = type(reward).__name__
    if isinstance(reward, type):
        raise ConfigError(f"{name}: {reward.__name__} is a class; give an object, such as {reward.__name__}()")
    if isinstance(reward, TokenReward | RolloutReward | PartedReward):
        return reward
    is_function = callable(reward) and not isinstance(reward, nn.Module)
    method = getattr(reward, "score", reward if is_function else None)
    if method is None or isinstance(method, nn.Module):  # transformers' classifiers have a layer of that name
        raise ConfigError(f"{name}: {kind} has no method score; give a function, or an object with score{PARAMETERS}")
    label = getattr(reward, "__qualname__", kind)
    if not takes_texts(method):
        takes = inspect.signature(method)
        raise ConfigError(f"{name}: {label} takes {takes}; a reward takes {PARAMETERS}")
    if is_function and method is reward:
        return FunctionReward(label, reward)
    scorer: Reward = reward
    return scorer


def takes_texts(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with prompts, responses and metadata; True for one that is written in C."""
    if inspect.isbuiltin(getattr(function, "func", function)):
        return True
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # there is none
        return True
    try:
        signature.bind([], [], [])
    except TypeError:
        return False
    return True
