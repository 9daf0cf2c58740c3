"""The jobs of a sweep: where each lies, which failed and why, and their comparison."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from src.config.files import key_of
from src.config.schema import PPORun, Run
from src.errors import ConfigError
from src.report.compare import OF_STAGE, PAGE, write_comparison
from src.report.read import RunData, figures, read_run
from src.utils.exits import one_sentence
from src.utils.terminal import say

JOBS = "jobs"
SWEPT = "swept.json"
METRICS = {"sft": "sft.nll_per_token", "reward": "reward_model.accuracy", "ppo": "ppo.score"}
SHOWN = ("score", "gold", "kl")  # figures of a PPO job in the terminal's table; of other stages the first three


@dataclass
class Job:
    """A job of a sweep; `folder` is None until it has one, `error` None unless it failed."""

    overrides: list[str]
    folder: str | None = None
    error: str | None = None


def sweep_folder(overrides: list[str]) -> Path:
    """The folder of a sweep: what the command says, or LOG_DIR/sweeps/NAME, the same for the same overrides."""
    values = {key_of(override): override.partition("=")[2] for override in overrides}
    if "hydra.sweep.dir" in values:
        return Path(values["hydra.sweep.dir"].strip("'\""))
    named = [o for o in overrides if not o.startswith(("log_dir=", "resume=", "hydra"))]
    swept = "_".join(re.sub(r"[^\w.-]+", "-", override) for override in sorted(named) if "," in override)
    digest = hashlib.sha256("\0".join(sorted(named)).encode()).hexdigest()[:8]
    return Path(values.get("log_dir", "logs").strip("'\"")) / "sweeps" / f"{swept[:60] or 'sweep'}-{digest}"


def begin(folder: Path, swept: list[str]) -> float:
    """Note which keys have several values, for jobs in other processes; returns the time, in seconds since 1970."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SWEPT).write_text(json.dumps(swept) + "\n", encoding="utf-8")
    return time.time()


def swept_in(folder: str) -> list[str]:
    """The keys that `begin` has noted; empty for a sweep that another command has started."""
    path = Path(folder) / SWEPT
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


@contextmanager
def recorded(folder: str, overrides: list[str]) -> Iterator[Job]:
    """Write how a job ended into `folder`/jobs, also when it fails, in whatever process it runs."""
    job = Job(overrides)
    try:
        yield job
    except BaseException as error:
        job.error = one_sentence(error) or type(error).__name__
        raise
    finally:
        name = hashlib.sha256("\0".join(overrides).encode()).hexdigest()[:16]
        place = Path(folder) / JOBS / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(asdict(job)) + "\n", encoding="utf-8")


def compare_jobs(folder: Path, started: float) -> None:
    """Print the table of the jobs that ended since `started` (seconds since 1970), and write their page."""
    paths = sorted((folder / JOBS).glob("*.json"), key=lambda path: path.stat().st_mtime)
    ended = [path for path in paths if path.stat().st_mtime >= started - 1]
    jobs = [Job(**json.loads(path.read_text(encoding="utf-8"))) for path in ended]
    runs: dict[str | None, RunData] = {
        job.folder: read_run(Path(job.folder)) for job in jobs if job.folder and Path(job.folder).is_dir()
    }
    if not jobs:
        return
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    names = [" ".join(override for override in job.overrides if override not in shared) for job in jobs]
    Console().print(_table(jobs, names, runs))
    failed = {name: job.error for name, job in zip(names, jobs, strict=True) if job.error is not None}
    for name, error in failed.items():
        say(f"failed: {name}\n  {error}")
    if runs:
        say(f"open first\n  {write_comparison([str(run.folder) for run in runs.values()], folder / PAGE, failed)}")


def metric_of(run: Run) -> str:
    """The name of the figure that a sweep maximizes: `sweep_metric`, or the stage's main one."""
    return run.sweep_metric or METRICS[run.stage]


def refuse_missing_figure(run: Run) -> None:
    """Raise `ConfigError` for a gold score that is to be maximized and will not be measured."""
    if isinstance(run, PPORun) and run.gold_reward is None and metric_of(run).endswith(".gold"):
        raise ConfigError(
            f"sweep_metric={metric_of(run)}: gold_reward=none measures no gold score; choose one, as gold_reward=vader"
        )


def _table(jobs: list[Job], names: list[str], runs: dict[str | None, RunData]) -> Table:
    """A row per job: what sets it apart, and its main figures with their intervals."""
    table = Table(title=f"{len(jobs)} jobs (95% intervals over held-out rows)")
    found = [_of_job(runs[job.folder]) if job.folder in runs else {} for job in jobs]
    known = list(dict.fromkeys(name for figures_of_job in found for name in figures_of_job))
    shown = [name for name in SHOWN if name in known] or known[:3]
    for column in ("job", *shown):
        table.add_column(column, justify="left" if column == "job" else "right")
    for job, name, own in zip(jobs, names, found, strict=True):
        state = "failed" if job.error is not None else ""
        table.add_row(escape(name), *(own.get(column, state) for column in shown))
    return table


def _of_job(run: RunData) -> dict[str, str]:
    found = figures(run.result).get(OF_STAGE.get(run.stage, "ppo"), {})
    return {
        name: f"{value:.3f}" + (f"\n{ends[0]:.3f} to {ends[1]:.3f}" if ends else "")
        for name, (value, ends) in found.items()
    }
