"""Holds every call of `src.core` to its annotations: shapes and dtypes by jaxtyping, all other types by typeguard.

`tests/conftest.py` installs `checked` before anything imports `src.core`. typeguard's own decorator (version 4) reads
the source of a function, which those that jaxtyping makes do not have; its `check_type` needs none.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from typeguard import CollectionCheckStrategy, check_type

check = functools.partial(check_type, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its arguments and its result compared with its annotations at each call."""
    signature, hints = inspect.signature(function), function.__annotations__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name, given in signature.bind(*args, **kwargs).arguments.items():
            several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            for value in given if several else [given]:
                check(value, hints.get(name, Any))
        return check(function(*args, **kwargs), hints.get("return", Any))

    return call
