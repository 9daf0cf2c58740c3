"""What a run says at its end: one table, a few examples, where everything lies; and one sentence when it fails."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from src.checkpointing.checkpoint import FULL_DISK
from src.config.compose import settings_hash
from src.config.errors import explain
from src.errors import UserError
from src.modules.ppo import PPOModule
from src.rollout.evaluation import Evaluation, merge
from src.rollout.oom_retry import out_of_memory
from src.utils.signals import Interrupted
from src.utils.statistics import Figure, as_result

ROWS = {
    "score": "score of the reward",
    "greedy_score": "the same, greedy decoding",
    "gold": "gold score",
    "kl": "KL to the reference (nats per sequence)",
    "response_length": "response length (tokens)",
    "eos_fraction": "share ended by EOS",
    "grammatical": "share of grammatical sentences",
    "distinct": "share of distinct responses",
}


def quiet_libraries() -> None:
    """Keep the console for this project's own words: no tips, no banners, no bars of the libraries."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(lightning|peft|transformers)\.")


class JobFailedError(RuntimeError):
    """One job of a sweep failed, and has said why."""


MENDABLE = (UserError, HydraException, OmegaConfBaseException, MisconfigurationException)


@contextmanager
def friendly_errors(overrides: list[str] | None = None, job_of_sweep: bool = False) -> Iterator[None]:
    """Turn errors that a person can mend into one sentence on stderr and exit code 2, signals into 128 + their number.

    A job of a sweep says its sentence at once and raises `JobFailedError`, so that the other jobs run all the same.
    """
    try:
        yield
    except JobFailedError:
        print("error: not every job of the sweep worked; the others have their results", file=sys.stderr)
        raise SystemExit(2) from None
    except (*MENDABLE, RuntimeError) as error:
        given = sys.argv[1:] if overrides is None else overrides
        sentence = _sentence(error, given)
        if sentence is None:
            raise
        if job_of_sweep:
            print(f"error: job {' '.join(given)}: {sentence}", file=sys.stderr)
            raise JobFailedError(sentence) from None
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(f"error: {error.strerror}{where}: make room, then the same command goes on", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as interrupted:
        print(f"interrupted by {interrupted.sentence()}", file=sys.stderr)
        raise SystemExit(128 + interrupted.signum) from None
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what was finished", file=sys.stderr)
        raise SystemExit(130) from None


def _sentence(error: Exception, overrides: list[str]) -> str | None:
    """What a person can do about an error; None for one that is a fault of the program."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error, overrides)
    if isinstance(error, MENDABLE):
        return one_sentence(error)
    if out_of_memory(error):
        return (
            f"memory ran out ({one_sentence(error)[:200]}): smaller batches (the stage's batch_size, "
            f"rollout.scoring_batch_size) or shorter texts take less; `python -m src.memory` says what PPO takes; the "
            f"last checkpoint stands"
        )
    return None


def one_sentence(error: Exception) -> str:
    """The message on one line."""
    return " ".join(str(error).split())


def make_result(config: DictConfig, figures: dict[str, dict[str, Figure]], seconds: float) -> dict[str, Any]:
    """The content of `result.json`; docs/results_format.md says what is in it."""
    return {
        "format": 1,
        "stage": config.stage,
        "seconds": round(seconds, 1),
        "git_revision": git_revision(),
        "config_hash": settings_hash(config)[:12],
        "seed": config.seed,
        **{name: as_result(group) for name, group in figures.items()},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def git_revision() -> str | None:
    """The commit of this checkout, with `-dirty` when files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def report(folder: Path, module: LightningModule) -> None:
    """Print the table of the stage, examples where there are any, and the run's files."""
    console = Console()
    if isinstance(module, PPOModule):
        evaluation = merge(module.evaluations)
        console.print(comparison_table(evaluation))
        console.print(examples_table(evaluation, 5))
    else:
        console.print(figures_table(module.result()))
    print(f"{folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))


def comparison_table(evaluation: Evaluation) -> Table:
    """SFT policy beside PPO policy, on the same held-out prompts, with the same random numbers."""
    sft, ppo = evaluation.reference.figures(), evaluation.policy.figures()
    table = Table(title=f"{len(evaluation.policy.prompts)} held-out prompts, same sampling seed (95% intervals)")
    for column in ("", "SFT policy", "PPO policy"):
        table.add_column(column, justify="left" if not column else "right")
    for name, title in ROWS.items():
        if name in ppo:
            table.add_row(title, f"{sft[name]:.3f}", f"{ppo[name]:.3f}")
    return table


def examples_table(evaluation: Evaluation, rows: int) -> Table:
    """The first responses of both to the same prompts."""
    table = Table(title="before and after", show_lines=True)
    for column in ("prompt", "SFT policy", "PPO policy"):
        table.add_column(column)
    answers = zip(evaluation.policy.prompts, evaluation.reference.responses, evaluation.policy.responses, strict=True)
    for row in list(answers)[:rows]:
        table.add_row(*(escape(text.strip()) for text in row))
    return table


def figures_table(groups: dict[str, dict[str, Figure]]) -> Table:
    """Every figure of a stage."""
    table = Table()
    for column in ("", "held out (95% interval)", "n"):
        table.add_column(column, justify="left" if not column else "right")
    for group, figures in groups.items():
        for name, figure in figures.items():
            table.add_row(f"{group}.{name}", f"{figure:.3f}", str(figure.n))
    return table
