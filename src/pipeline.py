"""The whole job in one command: SFT, reward model, PPO, comparison.

  python -m src.pipeline                           the embedded default
  python -m src.pipeline sft.steps=400 ppo.clip=0.1
  python -m src.pipeline experiment=movie_reviews data.path=reviews.jsonl
  python -m src.pipeline reward_net=adapter reward=adapter

Each stage gets the overrides that it reads. The last line: policy, critic,
reference and reward model on one base.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from src.checkpointing.resume import LENGTHS, changed_keys, describe_changes, edited_code, may_change, plain_config
from src.config.compose import compose, readable_by
from src.config.errors import quoted, repeated
from src.config.files import key_of
from src.config.schema import PPORun, Run
from src.errors import ConfigError
from src.runs.find import RunFolder, load_config
from src.runs.folder import FINISHED, has_result, run_folder, run_folders, set_aside_damaged
from src.runs.prerequisites import keep
from src.runs.report import pictures, write_json
from src.runs.start import train
from src.stages.base import Stage
from src.stages.builders import stage_of
from src.stages.code import own_code
from src.utils.exits import friendly_errors
from src.utils.launch import launched
from src.utils.output import set_up_output
from src.utils.terminal import say

STAGES = ("sft", "reward", "ppo")
# later stages' paths that a stage's folder, or what lies in it, is the value of
HANDED_ON = {"sft": {"reward": ("model", "model"), "ppo": ("model", "model")}, "reward": {"ppo": ("reward", "")}}
# keys beside those that change what is learned, with other values of which a finished stage's result would be another
MEASURED = ("ppo.eval_prompts", "sft.eval_rows", "data.path")


def run_pipeline(overrides: list[str]) -> dict[str, Any]:
    """Run the stages in one folder, handing each stage's model to the next; returns the merged result.

    The reward stage is left out when the overrides name another reward.
    """
    runs = compose_stages(overrides)
    first = next(iter(runs.values()))
    folder = run_folder(Path(first.log_dir) / "pipeline", first.name, overrides, first.resume)
    stages: dict[str, Stage[Any]] = {}
    for name, run in runs.items():  # whatever is wrong is said before the first stage runs
        stages[name] = stage_of(run.model_copy(update={"run_dir": str(folder / name)}))
        stages[name].check_training()
        refuse_other_settings(stages[name].run, folder / name, own_code(stages[name].code))
        if run.trainer.strategy is not None and launched():
            raise ConfigError("the pipeline starts its processes by itself: run it without torchrun and srun")
    results: dict[str, Any] = {}
    set_up_output()
    usual = next(run_folders(folder.parent, first.name, overrides))
    if folder != usual:
        say(f"{usual} is kept as it is; this run goes to {folder}")
    for number, (name, stage) in enumerate(stages.items(), start=1):
        say(f"stage {number} of {len(stages)}: {name} -> {folder / name}")
        results[name] = _run_stage(stage, folder / name)
        if name != "ppo":
            keep(stage.run, folder / name)
        for later, (key, part) in HANDED_ON.get(name, {}).items():
            if later in stages:
                stages[later].set_paths(**{key: str((folder / name / part).resolve())})
    return _finish(folder, results, stages)


def compose_stages(overrides: list[str]) -> dict[str, Run]:
    """The configuration of each stage with the overrides that it reads; one that none reads raises `ConfigError`."""
    for override in overrides:
        if key_of(override) == "stage":
            raise ConfigError(f"{override}: the pipeline runs every stage; one alone: python -m src.train {override}")
        if key_of(override) == "resume" and override not in ("resume=auto", "resume=never"):
            raise ConfigError(f"{override}: a checkpoint belongs to one stage: python -m src.train {override}")
    runs = {stage: compose([f"stage={stage}", *readable_by(stage, overrides)]) for stage in reversed(STAGES)}
    ppo = runs["ppo"]
    if isinstance(ppo, PPORun) and getattr(ppo.reward, "path", "given") is not None:
        del runs["reward"]
    return {stage: runs[stage] for stage in STAGES if stage in runs}


def refuse_other_settings(run: Run, folder: Path, code: dict[str, str]) -> None:
    """Raise `ConfigError` if the stage in `folder` was finished with settings that would have given another result.

    The same holds for the user's own `code`. The paths that stages hand to one another do not count;
    `allow_config_change=true` takes the stage as it is.
    """
    if not (folder / FINISHED).exists() or not (folder / "config.yaml").exists():
        return
    before, now = plain_config(load_config(folder / "config.yaml")), plain_config(run)
    handed = {f"{key}.path" for later in HANDED_ON.values() for key, _ in later.values()}
    counts = {*LENGTHS, *MEASURED} | ({"model.path"} if run.stage == "sft" else set())
    changed = [key for key in changed_keys(before, now) if key in counts or not (key in handed or may_change(key, now))]
    edited = edited_code(RunFolder(folder, run).result().get("code", {}), code)
    if not changed and not edited:
        return
    what = f"settings: {describe_changes(before, now, changed)}" if changed else f"code of {', '.join(edited)}"
    if run.allow_config_change:
        say(f"taking {folder} as it is, although it was finished with other {what}")
        return
    raise ConfigError(
        f"{folder} was finished with other {what}; give the same again, or "
        f"allow_config_change=true takes it as it is; resume=never or another name starts from the beginning"
    )


def _run_stage(stage: Stage[Any], folder: Path) -> dict[str, Any]:
    """Train a stage, or read the result of one that was finished before an interruption."""
    if (folder / FINISHED).exists():  # be it empty
        set_aside_damaged(folder, "the stage is run again")
    if has_result(folder):
        say("finished before")
        return RunFolder(folder, stage.run).result()
    return train(stage.run, stage)


def _finish(folder: Path, results: dict[str, Any], stages: dict[str, Stage[Any]]) -> dict[str, Any]:
    """Merge the stages' results, write them and say where everything lies."""
    result = results["ppo"] | {"stage": "pipeline"}
    result["sft"] = results["ppo"]["sft"] | {"nll_per_token": results["sft"]["sft"]["nll_per_token"]}
    lines = []
    if "reward" in results:
        result["reward_model"] = results["reward"]["reward_model"]
        right, gap = result["reward_model"], stages["reward"].run.reward_model.min_gap
        lines = [
            f"reward model: {written(right, 'accuracy')} clear held-out pairs ordered correctly",
            f"  (clear: gold scores at least {gap:g} apart, or unknown)",
            f"  all pairs: {written(right, 'accuracy_all_pairs')}",
        ]
    result["seconds"] = round(time.time() - psutil.Process().create_time(), 1)
    write_json(folder / FINISHED, result)
    lines += [f"{result['seconds']:.0f} s in all; results in {folder}/{FINISHED}, one folder per stage next to it"]
    say("\n".join([*lines, *pictures(folder / "ppo", folder / "reward"), *next_commands(folder)]))
    return result


def written(figures: dict[str, Any], name: str) -> str:
    """A share of a result with its 95% interval and n."""
    low, high = figures["interval"][name]
    return f"{figures[name]:.3f} ({low:.3f} to {high:.3f}) of {figures['n'][name]}"


def next_commands(folder: Path) -> list[str]:
    """What to try with the folder of a pipeline."""
    return [
        f"next, after `source {os.path.relpath(sys.prefix)}/bin/activate`" if _is_not_activated() else "next",
        f"  python -m src.chat {folder}",
        f"  python -m src.evaluate {folder} prompts=FILE",
        "  python -m src.train ppo.clip=0.1",
        "    which reuses the SFT and reward model, if the other overrides are the same",
    ]


def _is_not_activated() -> bool:
    """Whether `python` in the user's shell may be another one, as after `make demo`."""
    return sys.prefix != sys.base_prefix and "VIRTUAL_ENV" not in os.environ


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value or group=option, as for python -m src.train")
    overrides = [quoted(override) for override in parser.parse_args().overrides]
    set_up_output()
    with friendly_errors(overrides):
        for sentence in repeated(overrides):
            say(sentence)
        run_pipeline(overrides)


if __name__ == "__main__":
    main()
