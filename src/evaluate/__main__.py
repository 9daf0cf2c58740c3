"""Measure a model on your own prompts: reward, gold, KL, length, repetition, diversity, win rate.

python -m src.evaluate logs/ppo/default prompts=prompts.jsonl            the run's policy beside its reference
python -m src.evaluate logs/ppo/default prompts=p.txt reward=vader       scored by another reward
python -m src.evaluate FOLDER prompts=p.txt reward=vader                 a plain model, without a reference
python -m src.evaluate FOLDER prompts=p.txt reward=vader reference=BASE  and with one
python -m src.evaluate logs/ppo/default prompts=answered.jsonl           the column `responses` is scored

prompts=FILE is .jsonl (column `prompt`, all others go to the reward) or text, one prompt a line. All other key=value
are those of python -m src.train, upon the run's own (rollout.temperature=0.7, ...). Writes result.json
(every figure with n and 95% interval) and rows.jsonl (a line per answer) into out=FOLDER, by default
RUN/evaluation/NAME-OF-THE-FILE.
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
from src.runs.find import Run, find_run, own_settings, settings_of
from src.runs.folder import FINISHED, make_folder, run_folder
from src.runs.report import figures_table, friendly_errors, make_result, quiet_libraries, write_json

SETTINGS = {"prompts": None, "reference": None, "out": None}


def evaluate(given: str, arguments: list[str]) -> Path:
    """Measure, show and write; returns the folder of the result."""
    started = time.perf_counter()
    own, overrides = own_settings(arguments, SETTINGS)
    if own["prompts"] is None:
        raise ConfigError("which prompts? add prompts=FILE (.jsonl with a column 'prompt', or text, one prompt a line)")
    run = find_run(given)
    if run is not None and run.stage == "reward":
        raise ConfigError(f"{given}: this is a reward model; give the folder of an SFT or PPO run")
    if run is not None and not run.model.is_dir():
        raise ConfigError(f"{given}: the run is unfinished and has saved no model: use python -m src.export")
    config = settings_of(run, given, overrides)
    if "path" in config.reward and config.reward.path is None:
        raise ConfigError(f"{given} says of no reward model: add reward=vader, or reward=learned reward.path=FOLDER")
    policy = str(run.model if run is not None else Path(given).expanduser())
    reference = own["reference"] or (run.before if run is not None and run.stage == "ppo" else None)
    folder = target(run, own, overrides)
    found = score_given(config, policy, own["prompts"]) or generate(config, policy, reference, own["prompts"])
    make_folder(folder)
    write_rows(folder / "rows.jsonl", found)
    facts = {
        "model": policy,
        "reference_model": reference,
        "prompts": str(own["prompts"]),
        "command": said(given, arguments),
    }
    result = make_result(config, found.figures, time.perf_counter() - started)
    write_json(folder / FINISHED, result | {"stage": "evaluation", **facts})
    Console().print(figures_table(found.figures))
    print(f"{folder}: result.json, rows.jsonl")
    return folder


def target(run: Run | None, own: dict[str, Any], overrides: list[str]) -> Path:
    """Where the result goes; an earlier one is never overwritten."""
    if own["out"] is not None:
        folder = Path(own["out"]).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is there and not empty: remove it, or give another folder with out=FOLDER")
        return folder
    parent = run.folder if run is not None else Path("logs")
    return run_folder(parent / "evaluation", Path(own["prompts"]).stem, overrides, "never")


def said(given: str, arguments: list[str]) -> str:
    """The command that repeats this."""
    return f"python -m src.evaluate {shlex.join([given, *arguments])}"


def write_rows(path: Path, found: Evaluated) -> None:
    """One JSON object per answer."""
    lines = [json.dumps(row, ensure_ascii=False) for row in found.rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a run, of a pipeline or of a model")
    parser.add_argument("settings", nargs="*", help="prompts=FILE out=FOLDER reference=FOLDER, and key=value")
    arguments = parser.parse_args()
    quiet_libraries()
    with friendly_errors(sys.argv[2:]):
        evaluate(arguments.model, arguments.settings)


if __name__ == "__main__":
    main()
