"""From overrides to checks: what training would compose, check, load and build, in a folder that is thrown away."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from src.callbacks.rollout import RolloutCallback
from src.config.compose import compose, with_value
from src.config.files import key_of
from src.config.schema import PPORun, Run
from src.doctor.examine import Checks, attempted, checks
from src.kernels.linear import bfloat16_is_native
from src.memory.checks import memory
from src.runs.prerequisites import find_trained, train_missing
from src.stages.base import Stage
from src.stages.builders import stage_of
from src.stages.ppo import PPOStage
from src.utils.check import Check


def diagnose(overrides: list[str]) -> Iterator[Check]:
    """What is sound and what is not in the run of `python -m src.train OVERRIDES`; nothing is written for it.

    The process is one, whatever `trainer.devices` says. A model that the run would train first is replaced by one with
    new weights, which the check `reward model` or `models` says.
    """
    stage = yield from attempted("configuration", _configuration(overrides))
    if stage is None:
        return
    with TemporaryDirectory(prefix="doctor-") as scratch:
        folder = Path(scratch)
        trainer = yield from attempted("device", _device(stage, folder))
        if trainer is None:
            return
        device = trainer.strategy.root_device
        if isinstance(stage.run, PPORun) and (yield from attempted("memory", _memory(stage.run, device))) is None:
            return
        found = yield from attempted("models", _models(stage, folder))
        if found is None or not isinstance(stage, PPOStage):
            return
        (module, data), trained = found
        with trainer.precision_plugin.forward_context():
            callback = RolloutCallback(stage.maker, stage.run.seed)
            yield from checks(module.to(device), data, callback, trained)


def _configuration(overrides: list[str]) -> Checks[Stage[Any]]:
    run = compose(overrides)
    stage = stage_of(run)
    stage.check_training()
    if run.trainer.strategy is not None:
        alone = {"strategy": None, "devices": 1, "num_nodes": 1}
        stage.run = run.model_copy(update={"trainer": run.trainer.model_copy(update=alone)})
    yield Check("configuration", f"stage {run.stage} with {len(overrides)} overrides can be made and checked")
    return stage


def _device(stage: Stage[Any], folder: Path) -> Checks[Any]:
    trainer = stage.trainer([], folder)
    versions = f"Python {python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    dtype, precision = stage.model.dtype, stage.run.trainer.precision
    slow = device.type == "cpu" and (dtype == "bfloat16" or precision == "bf16-mixed") and not bfloat16_is_native()
    note = "; this processor has no units for bfloat16, which saves memory here, and no time" if slow else ""
    yield Check(
        "device", f"{device} ({name}), model.dtype={dtype}, precision {precision}{note}; {versions}, {sys.platform}"
    )
    return trainer


def _memory(run: PPORun, device: torch.device) -> Checks[bool | None]:
    """None if the models would not fit, as loading them could end this process."""
    check = memory(run, device)
    yield check
    return None if check.level == "fault" else True


def _models(stage: Stage[Any], folder: Path) -> Checks[Any]:
    """Module and data of the stage, and whether the reward is one that is trained."""
    run, found = stage.run, find_trained(stage.run)
    stage.set_paths(**found)
    missing = _stand_ins(stage.run, folder)
    stage.set_paths(**missing)
    built = stage.build(stage.corpus(), folder)
    sentence = f"{type(built[0]).__name__} and {type(built[1]).__name__} are made"
    if "model" in missing:
        mend = "train it (stage=sft), then examine again: responses and scores here are those of new weights"
        yield Check("models", f"{sentence}; the SFT model is not trained yet, new weights replace it", "warning", mend)
    else:
        yield Check("models", f"{sentence} from {stage.model.path or run.model.name}")
    return built, "reward" not in missing


def _stand_ins(run: Run, folder: Path) -> dict[str, str]:
    """Folders of models with new weights for those that the run would train first."""
    elsewhere = [o for o in run.overrides if key_of(o) != "log_dir"] + [with_value("log_dir", str(folder))]
    return train_missing(run.model_copy(update={"overrides": elsewhere, "log_dir": str(folder)}), _untrained)


def _untrained(run: Run) -> dict[str, Any]:
    """The models of a stage, saved as they are made."""
    stage, folder = stage_of(run), Path(run.run_dir or "")
    stage.check_training()
    module: Any = stage.build(stage.corpus(), folder)[0]
    module.save(folder)
    return {}
