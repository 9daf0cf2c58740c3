"""Tasks of the package reasoning-gym by their names.

`python -m src.utils.gym FILE` reads the pickled arguments of `entries_of` from FILE and writes the entries into it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from difflib import get_close_matches
from pathlib import Path
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


def entries_of(task: str, params: dict[str, Any] | None, questions: int, seed: int) -> list[dict[str, Any]]:
    """The first `questions` entries of a task, the same ones in every process.

    Some tasks go through sets of texts, whose order Python draws for each process. So the entries are made by a
    process that draws none (PYTHONHASHSEED=0). Raises `DataError` as `task_of` does, and for a task that fails.
    """
    task_of(task, params, questions, seed)  # its refusals, in this process
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "entries"
        file.write_bytes(pickle.dumps((task, params, questions, seed)))
        environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "src.utils.gym", str(file)]
        made = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if made.returncode:
            reason = (made.stderr.strip().splitlines() or [f"exit code {made.returncode}"])[-1]
            raise DataError(f"data.task={task}: reasoning-gym cannot make its questions: {reason}")
        entries: list[dict[str, Any]] = pickle.loads(file.read_bytes())
        return entries


if __name__ == "__main__":
    asked = Path(sys.argv[1])
    name, settings, count, start = pickle.loads(asked.read_bytes())
    made_by = task_of(name, settings, count, start)
    asked.write_bytes(pickle.dumps([made_by[index] for index in range(count)]))
