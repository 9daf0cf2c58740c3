"""Tasks of the package reasoning-gym by their names."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from src.errors import DataError


def task_of(task: str, params: dict[str, Any] | None, size: int = 1, seed: int = 1) -> Any:
    """The data set of a task. Raises `DataError` for a task or parameters that the package does not know."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"data.task={task}: the package reasoning-gym is not installed: pip install -e '.[real]'"
        ) from error
    if task not in DATASETS:
        close = get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else "its gallery lists them"
        raise DataError(f"data.task={task}: reasoning-gym has no such task; {hint}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **(params or {}))
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"data.params={params}: the task {task} refuses them: {error}") from error
