"""Repeat the first seed of a recorded study on the code of today, and compare figure by figure.

A table whose code has changed since may still be what the code of today gives. One seed costs a fraction of the study,
and a run is repeatable to the bit on the same kind of processor, so equal figures say that the others hold as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

UNLIKE = frozenset({"seconds", "format"})  # not results of the method


def figures(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """The numbers of a JSON document with their places, `1/ppo/gold`."""
    if isinstance(tree, dict | list):
        for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if key not in UNLIKE:
                yield from figures(branch, (*path, str(key)))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield "/".join(path), float(tree)


def differences(recorded: Any, repeated: Any) -> list[str]:
    """The figures in both that are not equal, in relative terms of 1e-9; a newer result may hold further ones.

    Raises `ValueError` when no figure is in both.
    """
    old, new = dict(figures(recorded)), dict(figures(repeated))
    both = [place for place in new if place in old]
    if not both:
        raise ValueError("no figure of the repetition is among the recorded ones")
    unequal = [place for place in both if not math.isclose(new[place], old[place], rel_tol=1e-9, abs_tol=1e-12)]
    return [f"{place}: {new[place]:.6g}, recorded {old[place]:.6g}" for place in unequal]


def repeated(run: Callable[[], None], table: Path, written: Iterable[Path]) -> list[str]:
    """`differences` between the JSON file `table` as it is and as `run` writes it.

    All files that `run` may have `written` are as before when this returns or raises.
    """
    before = {path: path.read_bytes() for path in {table, *written}}
    try:
        run()
        return differences(json.loads(before[table]), json.loads(table.read_bytes()))
    finally:
        for path, content in before.items():
            path.write_bytes(content)
