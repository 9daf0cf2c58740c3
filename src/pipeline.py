"""The whole job in one command: SFT -> reward model -> PPO -> comparison.

python -m src.pipeline                                  the embedded default
python -m src.pipeline experiment=movie_reviews data.path=reviews.jsonl
python -m src.pipeline sft.steps=400 ppo.clip=0.1       each stage takes the overrides that mean something to it
python -m src.pipeline reward_net=adapter reward=adapter  policy, critic, reference and reward model on one base
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from src.checkpointing.resume import LENGTHS, changed_keys, describe_changes, is_safe, plain
from src.config.compose import compose, taken, with_value
from src.config.errors import key_of, quoted, repeated
from src.config.validate import preflight
from src.errors import ConfigError
from src.runs.folder import FINISHED, run_folder
from src.runs.report import friendly_errors, quiet_libraries, write_json
from src.train import train
from src.utils.launch import launched

STAGES = ("sft", "reward", "ppo")
# later stages' keys that a stage's folder, or what lies in it, is the value of
HANDED_ON = {
    "sft": {"reward": ("model.path", "model"), "ppo": ("model.path", "model")},
    "reward": {"ppo": ("reward.path", "")},
}
# keys beside those that change what is learned, with other values of which a finished stage's result would be another
MEASURED = ("ppo.eval_prompts", "sft.eval_rows", "data.path")


def run_pipeline(overrides: list[str]) -> dict[str, Any]:
    """Run the stages in one folder, handing each stage's model to the next; returns the merged result.

    The reward stage is left out when the overrides name another reward. It gets the choice of a model only where the
    reward model is an adapter on it: any other reads text and serves any policy.
    """
    shared = share_out(overrides)
    stages = STAGES if _needs_reward_model(shared["ppo"]) else ("sft", "ppo")
    first = compose(["stage=sft", *shared["sft"]])
    folder = run_folder(Path(first.log_dir) / "pipeline", first.name, overrides, first.resume)
    for stage in stages:  # whatever is wrong is said before the first stage runs
        # the reward stage will be handed a model of the same architecture; its default may be one that is not here
        model = [o for o in shared["sft"] if key_of(o).split(".")[0] == "model" and o not in shared[stage]]
        config = compose([f"stage={stage}", *shared[stage], *model])
        config.run_dir = str(folder / stage)
        preflight(config)
        refuse_other_settings(compose([f"stage={stage}", *shared[stage]]), folder / stage)
        if "strategy" in config.trainer and launched():
            raise ConfigError("the pipeline starts its processes by itself: run it without torchrun and srun")
    given: dict[str, list[str]] = {stage: [] for stage in stages}
    results: dict[str, Any] = {}
    for number, stage in enumerate(stages, start=1):
        print(f"stage {number} of {len(stages)}: {stage} -> {folder / stage}")
        results[stage] = _run_stage(stage, [*shared[stage], *given[stage]], folder / stage)
        for later, (key, part) in HANDED_ON.get(stage, {}).items():
            if later in stages:
                given[later].append(with_value(key, str((folder / stage / part).resolve())))
    return _finish(folder, results)


def share_out(overrides: list[str]) -> dict[str, list[str]]:
    """The overrides that each stage takes. Raises `ConfigError` for one that no stage takes."""
    for override in overrides:
        if key_of(override) == "stage":
            raise ConfigError(f"{override}: the pipeline runs every stage; one alone: python -m src.train {override}")
        if key_of(override) == "resume" and override not in ("resume=auto", "resume=never"):
            raise ConfigError(f"{override}: a checkpoint belongs to one stage: python -m src.train {override}")
    shared = {stage: taken(stage, overrides) for stage in STAGES}
    for override in overrides:
        if not any(override in own for own in shared.values()):
            compose(["stage=ppo", *shared["ppo"], override])  # raises the sentence that says why
    if "model" not in compose(["stage=reward", *shared["reward"]]).reward_model.net:
        shared["reward"] = [override for override in shared["reward"] if key_of(override).split(".")[0] != "model"]
    return shared


def _needs_reward_model(overrides: list[str]) -> bool:
    """Whether PPO's reward is a learned one for which no folder is given."""
    reward = compose(["stage=ppo", *overrides]).reward
    return "path" in reward and reward.path is None


def refuse_other_settings(config: DictConfig, folder: Path) -> None:
    """Raise `ConfigError` if the stage in `folder` was finished with settings that would have given another result.

    What stages hand to one another (weights) counts for nothing; `allow_config_change=true` takes the stage as it is.
    """
    if not (folder / FINISHED).exists() or not (folder / "config.yaml").exists():
        return
    saved = OmegaConf.load(folder / "config.yaml")
    assert isinstance(saved, DictConfig)
    config.run_dir, before = str(folder), plain(saved)
    handed = {key for later in HANDED_ON.values() for key, _ in later.values()}
    counts = {*LENGTHS, *MEASURED} | ({"model.path"} if config.stage == "sft" else set())
    changed = [
        key for key in changed_keys(before, config) if key in counts or not (key in handed or is_safe(key, config))
    ]
    if not changed:
        return
    if config.allow_config_change:
        print(f"taking {folder} as it is, although it was finished with other settings: {', '.join(changed)}")
        return
    raise ConfigError(
        f"{folder} was finished with other settings: {describe_changes(before, config, changed)}; give the same again, "
        f"or allow_config_change=true takes it as it is; resume=never or another name starts anew"
    )


def _run_stage(stage: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train a stage, or read the result of one that was finished before an interruption."""
    if (folder / FINISHED).exists():
        print("finished before")
        return json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    config = compose([f"stage={stage}", *overrides])
    config.run_dir = str(folder)
    return train(config)


def _finish(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Merge the stages' results, write them and say where everything lies."""
    result = results["ppo"] | {"stage": "pipeline"}
    result["sft"] = results["ppo"]["sft"] | {"nll_per_token": results["sft"]["sft"]["nll_per_token"]}
    if "reward" in results:
        result["reward_model"] = results["reward"]["reward_model"]
        print(f"reward model: {result['reward_model']['accuracy']:.3f} of held-out pairs ordered rightly")
    result["seconds"] = round(time.time() - psutil.Process().create_time(), 1)
    write_json(folder / FINISHED, result)
    print(f"{result['seconds']:.0f} s in all")
    print(f"{folder}: result.json, and {', '.join(results)}: each with its model, metrics and configuration")
    return result


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value or group=option, as for python -m src.train")
    overrides = [quoted(override) for override in parser.parse_args().overrides]
    quiet_libraries()
    with friendly_errors(overrides):
        for sentence in repeated(overrides):
            print(sentence)
        run_pipeline(overrides)


if __name__ == "__main__":
    main()
