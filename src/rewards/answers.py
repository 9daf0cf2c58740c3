"""What a reward returns, as numbers in the form that is needed; whether they are finite is not checked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.errors import RewardError


def reward_name(reward: Any) -> str:
    """The name of a reward in messages: a function's dotted path, else the class."""
    return str(getattr(reward, "target", type(reward).__name__))


def as_numbers(reward: Any, given: Any, shape: torch.Size, what: str = "responses") -> tuple[Tensor, dict[int, Any]]:
    """What a reward returned as float32 in `shape`, one for each of `what`; and the elements that are no numbers.

    The latter are NaN in the first result and lie by their row in the second. Raises `RewardError` for a value that
    is no sequence, or has another shape.
    """
    others: dict[int, Any] = {}
    if hasattr(given, "to_numpy") and list(given.index) != list(range(len(given))):
        returned = f"a {type(given).__name__} with the index {list(given.index)!r:.80}"
        raise _unfit(reward, f"{returned}, whose order is not clear (give .to_list()),", shape, what)
    try:
        scores = torch.as_tensor(given, dtype=torch.float32).detach()
    except (TypeError, ValueError, OverflowError):
        if not _is_row_of(given, shape):
            raise _unfit(reward, " ".join(f"{given!r:.80}".split()), shape, what) from None
        scores, others = _one_by_one(given)
    if scores.shape != shape:
        count = len(scores) if scores.dim() == 1 else 0
        numbers = {0: "a single number", 1: "1 number" if count == 1 else f"{count} numbers"}
        raise _unfit(reward, numbers.get(scores.dim(), f"{tuple(scores.shape)} numbers"), shape, what)
    return scores, others


def _is_row_of(given: Any, shape: torch.Size) -> bool:
    """Whether a value has one element for each response."""
    is_row = isinstance(given, Sequence | np.ndarray) and not isinstance(given, str | bytes)
    return is_row and len(shape) == 1 and len(given) == shape[0]


def _one_by_one(given: Sequence[Any] | np.ndarray[Any, Any]) -> tuple[Tensor, dict[int, Any]]:
    """Each element as a number: NaN where it is none, and those elements by their row."""
    scores, others = torch.full((len(given),), torch.nan), {}
    for row, element in enumerate(given):
        try:
            scores[row] = torch.as_tensor(element, dtype=torch.float32).detach()
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: several numbers
            others[row] = element
    return scores, others


def _unfit(reward: Any, returned: str, shape: torch.Size, what: str) -> RewardError:
    rows = f"{shape[0]}" if len(shape) == 1 else f"{tuple(shape)}"
    one = what.removesuffix("s") if rows == "1" else what
    name = reward_name(reward)
    return RewardError(f"reward {name} returned {returned} for {rows} {one}: one number for each is needed")
