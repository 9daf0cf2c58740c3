"""What a run prints at its end: one table, a few examples, the paths of its results."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from rich.text import Text

from src.config.compose import settings_hash
from src.config.schema import Run
from src.errors import UserError
from src.modules.ppo import PPOModule
from src.report.bands import band_of_run, band_title, left
from src.report.page import PAGE
from src.report.read import read_run
from src.rollout.evaluation import Evaluation, merge
from src.utils.statistics import Figure, as_result
from src.utils.terminal import shown

ROWS = {
    "score": "score of the reward",
    "greedy_score": "the same, greedy decoding",
    "gold": "gold score",
    "kl": "KL to the reference (nats per sequence)",
    "reference_nats": "nats per token under the reference",
    "response_length": "response length (tokens)",
    "eos_fraction": "share ended by EOS",
    "grammatical": "share of grammatical sentences",
    "distinct": "share of distinct responses",
    "distinct_2": "share of distinct bigrams",
}


TITLES = {  # of figures whose names alone could be misread
    "reward_model.accuracy": "clear pairs (see reward_model.min_gap) ordered correctly",
    "reward_model.accuracy_all_pairs": "all pairs ordered correctly",
    "reward_model.calibration_error": "calibration error",
    "reward_model.length_correlation": "correlation of score and length",
    "sft.nll_per_token": "nats per token of held-out text",
}
PICTURES = {  # pages and pictures of a run, and what they show
    PAGE: "all of it on one page, for a browser: what came out, texts, curves, tokens, settings",
    "curves.png": "score, gold, KL and losses over iterations",
    "gold.png": "score and gold against the distance to the reference",
    "reward.png": "margins and calibration of the reward model",
}


MENDABLE = (UserError, MisconfigurationException)


def make_result(run: Run, figures: dict[str, dict[str, Figure]], seconds: float) -> dict[str, Any]:
    """The content of `result.json`; docs/results_format.md says what is in it."""
    return {
        "format": 2,
        "stage": run.stage,
        "seconds": round(seconds, 1),
        "git_revision": git_revision(),
        "config_hash": settings_hash(run)[:12],
        "seed": run.seed,
        **{name: as_result(group) for name, group in figures.items()},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
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


def report(module: LightningModule) -> None:
    """Print the stage's table, and examples if there are any."""
    console = Console()
    if isinstance(module, PPOModule):
        evaluation = merge(module.evaluations)
        console.print(comparison_table(evaluation))
        console.print(examples_table(evaluation, 5))
    else:
        console.print(figures_table(module.result()))


def endings(folder: Path) -> list[str]:
    """Where the results of a run lie, and its pictures, the first one to open first."""
    others = sorted(path.name for path in folder.iterdir() if path.name not in PICTURES and path.name[0] != ".")
    return [f"results in {folder}", f"  {', '.join(others)}", *pictures(folder), *unusual(folder)]


def unusual(folder: Path) -> list[str]:
    """The curves of a run that left the band of its experiment, if that has one."""
    run = read_run(folder)
    band = band_of_run(run)
    curves = [] if band is None else left(run.metrics, band)
    if band is None or not curves:
        return []
    return [f"left {band_title(run, band)}", *(f"  {one.name}\n    {one.numbers()}" for one in curves)]


def pictures(*folders: Path) -> list[str]:
    """The page and the pictures in folders, each with what it shows; empty if there are none.

    The page of the first folder shows the runs that made its models too, so no other page is named.
    """
    found = [(folder / name, shows) for folder in folders for name, shows in PICTURES.items()]
    found = [(path, shows) for path, shows in found if path.name != PAGE or path.parent == folders[0]]
    drawn = [line for path, shows in found if path.is_file() for line in (f"  {path}", f"    {shows}")]
    return [*(["open first"] if drawn else []), *drawn[:2], *(["then"] if drawn[2:] else []), *drawn[2:]]


def comparison_table(evaluation: Evaluation) -> Table:
    """SFT policy and PPO policy on the same held-out prompts, with the same random numbers."""
    sft, ppo = evaluation.reference.figures(), evaluation.policy.figures()
    prompts = evaluation.policy.prompts
    table = Table(
        title=f"{len(prompts)} answers to {len(set(prompts))} held-out prompts, same sampling seed (95% intervals)"
    )
    for column in ("", "SFT policy", "PPO policy"):
        table.add_column(column, justify="left" if not column else "right")
    for name, title in ROWS.items():
        if name in ppo:
            table.add_row(title, f"{sft[name]:.3f}", f"{ppo[name]:.3f}")
    return table


def examples_table(evaluation: Evaluation, rows: int) -> Table:
    """The first responses of both policies to the same prompts."""
    table = Table(title="before and after", show_lines=True)
    for column in ("prompt", "SFT policy", "PPO policy"):
        table.add_column(column)
    answers = zip(evaluation.policy.prompts, evaluation.reference.responses, evaluation.policy.responses, strict=True)
    for row in list(answers)[:rows]:
        table.add_row(*(Text(shown(text.strip())) for text in row))
    return table


def figures_table(groups: dict[str, dict[str, Figure]], measured_on: str = "held out") -> Table:
    """Every figure of each group."""
    table = Table()
    for column in ("", f"{measured_on} (95% interval)", "n"):
        table.add_column(column, justify="left" if not column else "right")
    for group, figures in groups.items():
        for name, figure in figures.items():
            title = TITLES.get(f"{group}.{name}") or f"{group}: {ROWS.get(name, name)}"
            table.add_row(title, f"{figure:.3f}", str(figure.n))
    return table
