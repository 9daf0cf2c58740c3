"""Metrics as CSV: numbers that repeat exactly in metrics.csv, seconds in timing.csv."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class CsvTables(Logger):
    """One row per step in each table. Checkpoints hold the rows; a resumed run logs later rows again.

    Lightning's CSVLogger would delete the rows of the interrupted run.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.folder = Path(save_dir)
        self._tables: dict[str, dict[int, dict[str, float]]] | None = None

    @property
    def name(self) -> str:
        """The kind of this logger."""
        return "csv"

    @property
    def version(self) -> str:
        """A run folder holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the tables."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> dict[str, dict[int, dict[str, float]]]:
        """Rows by table and step."""
        if self._tables is None:
            self._tables = {"metrics": {}, "timing": {}}
        return self._tables

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add the numbers to their table."""
        step = int(step or 0)
        for table, rows in self.experiment.items():
            mine = {k: float(v) for k, v in metrics.items() if k.startswith("time/") == (table == "timing")}
            mine.pop("epoch", None)
            if mine:
                rows.setdefault(step, {}).update(mine)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run folder holds the whole configuration as config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Write both tables."""
        for name, rows in self.experiment.items():
            write_table(self.folder / f"{name}.csv", rows)

    @rank_zero_only
    def state_dict(self) -> dict[str, dict[int, dict[str, float]]]:
        """A copy of the rows by table and step."""
        return {name: {step: dict(row) for step, row in rows.items()} for name, rows in self.experiment.items()}

    @rank_zero_only
    def load_state_dict(self, state: dict[str, dict[int, dict[str, float]]]) -> None:
        """Restore the rows of a checkpoint; all other rows are deleted."""
        self._tables = {name: {step: dict(row) for step, row in rows.items()} for name, rows in state.items()}
        self.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last rows."""
        self.save()


def read_table(path: Path) -> dict[int, dict[str, float]]:
    """The rows of a table by step; empty when there is no file."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {int(row["step"]): {k: float(v) for k, v in row.items() if k != "step" and v} for row in rows}


def write_table(path: Path, rows: dict[int, dict[str, float]]) -> None:
    """Write rows in the order of their steps, columns in the order of their names, and rename into place."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = sorted({column for row in rows.values() for column in row})
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", *columns], restval="")
        writer.writeheader()
        writer.writerows({"step": step, **rows[step]} for step in sorted(rows))
    temporary.replace(path)
