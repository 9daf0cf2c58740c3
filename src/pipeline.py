"""The whole job in one command: SFT -> reward model -> PPO -> comparison.

    python -m src.pipeline                                  the embedded default
    python -m src.pipeline experiment=movie_reviews data.path=reviews.jsonl
    python -m src.pipeline sft.steps=400 ppo.clip=0.1       each stage takes the overrides that mean something to it
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from rich import print as rich_print

from src.report import friendly_errors, quiet_libraries, write_json
from src.train import train
from src.utils.config import ConfigError, compose, takes
from src.utils.run_folder import FINISHED, run_folder

STAGES = ("sft", "reward", "ppo")


def run_pipeline(overrides: list[str]) -> dict[str, Any]:
    """Run the three stages in one folder, handing each stage's model to the next; returns the merged result."""
    shared = share_out(overrides)
    first = compose(["stage=sft", *shared["sft"]])
    folder = run_folder(Path(first.log_dir) / "pipeline", first.name, overrides, first.resume)
    given: dict[str, list[str]] = {"sft": [], "reward": [], "ppo": []}
    results: dict[str, Any] = {}
    for number, stage in enumerate(STAGES, start=1):
        rich_print(f"[bold]stage {number} of {len(STAGES)}: {stage}[/bold] -> {folder / stage}")
        results[stage] = _run_stage(stage, [*shared[stage], *given[stage]], folder / stage)
        model = str((folder / stage / "model").resolve())
        for later, key in {"sft": {"reward": "model", "ppo": "model"}, "reward": {"ppo": "reward"}}.get(stage, {}).items():
            given[later].append(f"{key}.path={model}")
    result = results["ppo"] | {"stage": "pipeline", "reward_model": results["reward"]["reward_model"]}
    result["sft"] = results["ppo"]["sft"] | {"nats_per_token": results["sft"]["sft"]["nats_per_token"]}
    result["seconds"] = round(time.time() - psutil.Process().create_time(), 1)
    write_json(folder / FINISHED, result)
    accuracy = result["reward_model"]["accuracy"]
    rich_print(f"reward model: {accuracy:.3f} of held-out pairs ordered rightly; {result['seconds']:.0f} s in all")
    rich_print(f"[bold]{folder}[/bold]: result.json, and sft, reward, ppo: each with its model, metrics and configuration")
    return result


def share_out(overrides: list[str]) -> dict[str, list[str]]:
    """The overrides that each stage takes. Raises `ConfigError` for one that no stage takes."""
    shared: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for override in sorted(overrides, key=lambda text: "." in text.split("=")[0]):  # choices of groups come first
        takers = [stage for stage in STAGES if takes(stage, shared[stage], override)]
        if not takers or override.startswith("stage="):
            raise ConfigError(f"no stage takes {override!r}: see `python -m src.train stage=sft|reward|ppo --cfg job`")
        for stage in takers:
            shared[stage].append(override)
    return shared


def _run_stage(stage: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train a stage, or read the result of one that was finished before an interruption."""
    if (folder / FINISHED).exists():
        rich_print("finished before")
        return json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    config = compose([f"stage={stage}", *overrides])
    config.run_dir = str(folder)
    return train(config)


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value or group=option, as for python -m src.train")
    quiet_libraries()
    with friendly_errors():
        run_pipeline(parser.parse_args().overrides)


if __name__ == "__main__":
    sys.exit(main())
