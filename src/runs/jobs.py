"""One job of a sweep or a search: a run that is not repeated where it was finished before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.config.schema import Run
from src.errors import ConfigError
from src.report.sweep import Job, metric_of
from src.runs.find import finished_before
from src.runs.folder import run_folder
from src.runs.report import git_revision
from src.runs.start import start_run
from src.stages.code import code_of, own_code
from src.utils.terminal import say


def run_job(run: Run, record: Job) -> dict[str, Any]:
    """The result of the run, and its folder in `record`.

    A run that was finished before, with the same settings and revision, is not repeated unless `resume=never`.
    """
    before = finished_before(run, git_revision(), own_code(code_of(run)))
    if before is None:
        record.folder = str(run_folder(Path(run.log_dir) / run.stage, run.name, run.overrides, run.resume))
        return start_run(run)
    record.folder = str(before.folder)
    say(f"finished before: {before.folder}\n  (own data are not compared; resume=never repeats it)")
    return before.result()


def figure_of(result: dict[str, Any], run: Run) -> float:
    """The figure of a result that a sweep maximizes. Raises `ConfigError` where it has none of that name."""
    group, _, name = metric_of(run).partition(".")
    if name not in result[group]:
        raise ConfigError(f"sweep_metric={group}.{name}: this run has no such figure, only {', '.join(result[group])}")
    return float(result[group][name])
