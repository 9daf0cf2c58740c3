"""Measure a model on your own prompts: reward, gold, KL, length, diversity.

The policy of a run and its reference, or scored by another reward:

  python -m src.evaluate logs/ppo/default prompts=prompts.jsonl
  python -m src.evaluate logs/ppo/default prompts=p.txt reward=vader

A plain model without a reference, and with one:

  python -m src.evaluate FOLDER prompts=p.txt reward=vader
  python -m src.evaluate FOLDER prompts=p.txt reward=vader reference=BASE

Answers that are in the file already, in the column `responses`:

  python -m src.evaluate logs/ppo/default prompts=answered.jsonl

prompts=FILE is .jsonl (column `prompt`; the other columns go to the reward)
or text with one prompt per line. All other key=value overrides are those of
python -m src.train; they change the run's own settings. A run with your own
code, such as a reward function, needs --trust-run. Writes result.json
(every figure with n and 95% interval) and rows.jsonl (one line per answer) to
out=FOLDER, by default RUN/evaluation/NAME-OF-THE-FILE.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from src.errors import ConfigError
from src.evaluate.prompts import Evaluated, generate, score_given
from src.runs.find import RunFolder, find_run, own_settings, settings_of
from src.runs.folder import FINISHED, make_folder, make_writable, run_folder
from src.runs.report import figures_table, make_result, write_json
from src.runs.trust import HELP
from src.utils.exits import friendly_errors
from src.utils.output import set_up_output
from src.utils.terminal import say

SETTINGS = {"prompts": None, "reference": None, "out": None}


def evaluate(given: str, arguments: list[str], trusted: bool = False) -> Path:
    """Measure, print and write; returns the folder of the result. A `trusted` run may bring its own code."""
    started = time.perf_counter()
    own, overrides = own_settings(arguments, SETTINGS)
    if own["prompts"] is None:
        raise ConfigError("prompts is missing: add prompts=FILE (.jsonl with a column 'prompt', or a prompt per line)")
    run = find_run(given, arguments, trusted)
    if run is not None and run.stage == "reward":
        raise ConfigError(f"{given}: this is a reward model; give the folder of an SFT or PPO run")
    if run is not None and not run.model.is_dir():
        raise ConfigError(f"{given}: the run is unfinished and has no model yet: use python -m src.export")
    config = settings_of(run, given, overrides, trusted)
    if getattr(config.reward, "path", "given") is None:
        raise ConfigError(f"{given} names no reward model: add reward=vader, or reward=learned reward.path=FOLDER")
    policy = str(run.model if run is not None else Path(given).expanduser())
    reference = own["reference"] or (run.before if run is not None and run.stage == "ppo" else None)
    folder = target(run, own, overrides)
    make_writable(folder.parent)
    found = score_given(config, policy, own["prompts"]) or generate(config, policy, reference, own["prompts"])
    make_folder(folder)
    write_rows(folder / "rows.jsonl", found)
    facts = {
        "model": policy,
        "reference_model": reference,
        "prompts": str(own["prompts"]),
        "command": command(given, [*arguments, *(["--trust-run"] if trusted else [])]),
    }
    result = make_result(config, found.figures, time.perf_counter() - started)
    write_json(folder / FINISHED, result | {"stage": "evaluation", **facts})
    Console().print(figures_table(found.figures, "your prompts"))
    say(f"{folder}: result.json, rows.jsonl")
    return folder


def target(run: RunFolder | None, own: dict[str, Any], overrides: list[str]) -> Path:
    """The folder for the result; an earlier result is never overwritten."""
    if own["out"] is not None:
        folder = Path(own["out"]).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and is not empty: remove it, or choose another folder with out=FOLDER")
        return folder
    parent = run.folder if run is not None else Path("logs")
    return run_folder(parent / "evaluation", Path(own["prompts"]).stem, overrides, "never")


def command(given: str, arguments: list[str]) -> str:
    """The command that repeats this evaluation."""
    return f"python -m src.evaluate {shlex.join([given, *arguments])}"


def write_rows(path: Path, found: Evaluated) -> None:
    """Write one JSON object per answer."""
    lines = [json.dumps(row, ensure_ascii=False) for row in found.rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a run, of a pipeline or of a model")
    parser.add_argument("settings", nargs="*", help="prompts=FILE out=FOLDER reference=FOLDER, and overrides key=value")
    parser.add_argument("--trust-run", action="store_true", help=HELP)
    arguments = parser.parse_intermixed_args()
    set_up_output()
    with friendly_errors(sys.argv[2:]):
        evaluate(arguments.model, arguments.settings, arguments.trust_run)


if __name__ == "__main__":
    main()
