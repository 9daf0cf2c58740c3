"""Train one stage: `python -m src.train stage=sft|reward|ppo` (default ppo).

python -m src.train                                     the embedded default
python -m src.train model=gpt2 ppo.clip=0.2             another model, another knob
python -m src.train -m ppo.clip=0.1,0.2 seed=1,2        a sweep
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from src.checkpointing.checkpoint import IterationCheckpoint, checkpoints
from src.checkpointing.graceful_stop import GracefulStop
from src.checkpointing.metadata import RunMetadata
from src.checkpointing.resume import find_checkpoint, plain
from src.config.compose import compose, instantiate
from src.config.errors import CONF, quoted, repeated, unreadable
from src.config.help import help_page
from src.config.validate import preflight
from src.data.table_corpus import TableCorpus
from src.errors import ConfigError
from src.memory.__main__ import say_memory
from src.runs.folder import FINISHED, own_folder, run_folder
from src.runs.prerequisites import ensure
from src.runs.report import (
    MENDABLE,
    friendly_errors,
    git_revision,
    make_result,
    one_sentence,
    quiet_libraries,
    report,
    write_json,
)
from src.utils.device import accelerator
from src.utils.launch import in_processes, launched
from src.utils.signals import Interrupted


def train(config: DictConfig) -> dict[str, Any]:
    """Run the stage that `config` describes in `config.run_dir`; returns what `result.json` holds.

    Several processes are started here, and nowhere else: each comes back to this function as one of them.
    """
    folder = Path(config.run_dir)
    if "strategy" in config.trainer and not launched():
        in_processes(config.trainer.devices, train, config, MENDABLE)
        return json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    with ExitStack() as held:
        return _train(config, folder, held)


def _train(config: DictConfig, folder: Path, held: ExitStack) -> dict[str, Any]:
    """One process's part of it; `held` lets go of the folder, however it ends."""
    started = time.perf_counter()
    quiet_libraries()
    preflight(config)
    start = find_checkpoint(config)
    corpus = instantiate(config.data)
    trainer = _trainer(config)
    if trainer.is_global_zero:
        _make_folder(folder, config, held)
        say_memory(config)
        if isinstance(corpus, TableCorpus):
            print(corpus.report())
            write_json(folder / "data.json", corpus.account)
    tokenizer = instantiate(config.tokenizer)(corpus=corpus)
    datamodule = instantiate(config.datamodule)(corpus=corpus, tokenizer=tokenizer)
    module = instantiate(config.module)(tokenizer=tokenizer)
    try:
        with _listening(trainer):
            trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
            if trainer.is_global_zero:
                module.save(folder)
            trainer.test(module, datamodule=datamodule, verbose=False)
    except Interrupted as interruption:
        saved = checkpoints(folder / "checkpoints")
        interruption.kept = str(saved[-1]) if saved else None
        raise
    finally:
        _close(trainer)
    result = make_result(config, module.result(), time.perf_counter() - started)
    if trainer.is_global_zero:
        write_json(folder / FINISHED, result)
        report(folder, module)
    return result


def run(overrides: list[str]) -> dict[str, Any]:
    """Compose, make what is missing, and train."""
    config = compose(overrides)
    folder = run_folder(Path(config.log_dir) / config.stage, config.name, overrides, config.resume)
    config.run_dir = str(folder)
    preflight(config)
    if "strategy" in config.trainer and launched():
        _refuse_what_ranks_cannot_share(config)
    find_checkpoint(config)  # whatever is wrong with it is said before a model is trained for this run
    ensure(config, train)
    return train(config)


def _make_folder(folder: Path, config: DictConfig, held: ExitStack) -> None:
    """The run's folder with its configuration, for this run alone until `held` is closed or the process ends.

    Raises `ConfigError` when nothing can be written there or another process is at work in it.
    """
    try:
        held.callback(own_folder(folder).release)
    except OSError as error:
        raise ConfigError(f"log_dir={config.log_dir}: cannot write to {folder} ({error.strerror})") from error
    OmegaConf.save(config, folder / "config.tmp")
    (folder / "config.tmp").replace(folder / "config.yaml")


def _trainer(config: DictConfig) -> Trainer:
    """Lightning's Trainer with the callbacks and loggers of the run. Raises `ConfigError` for what it refuses."""
    callbacks = [callback for callback in instantiate(config.callbacks).values() if callback is not None]
    callbacks.sort(key=lambda callback: (isinstance(callback, GracefulStop), isinstance(callback, IterationCheckpoint)))
    record = RunMetadata(plain(config), git_revision(), config.allow_config_change)
    loggers = [logger for logger in instantiate(config.logger).values() if logger is not None]
    make = instantiate(config.trainer)
    try:
        chosen = accelerator(config.trainer.accelerator)
        return make(callbacks=[record, *callbacks], logger=loggers, accelerator=chosen)
    except (TypeError, ValueError, RuntimeError) as error:  # MisconfigurationException is none of these
        raise ConfigError(f"trainer: {one_sentence(error)}") from error


def _close(trainer: Trainer) -> None:
    """End the runs of loggers that keep one open (wandb), or the next job of a sweep would write into it."""
    for logger in trainer.loggers:
        finish = getattr(logger.experiment, "finish", None)
        if finish is not None:
            finish()


def _listening(trainer: Trainer) -> AbstractContextManager[None]:
    """Whatever the run's callbacks do about signals."""
    stops = [callback for callback in trainer.callbacks if isinstance(callback, GracefulStop)]
    return stops[0].listening() if stops else nullcontext()


def _refuse_what_ranks_cannot_share(config: DictConfig) -> None:
    """Processes that torchrun or Slurm has started come here each by itself, and cannot ask one another as yet."""
    if config.resume == "never":
        raise ConfigError(
            "resume=never: processes that torchrun or Slurm has started may choose different folders; use name"
        )
    needs = {"model": config.stage != "sft", "reward": config.stage == "ppo"}
    for key in [key for key, needed in needs.items() if needed and config[key].get("path", "") is None]:
        raise ConfigError(
            f"{key}.path must be given to processes that torchrun or Slurm has started: without them the same command "
            f"trains what it needs"
        )


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def job(config: DictConfig) -> float:
    """One run; returns the figure that sweepers maximize (`sweep_metric`)."""
    quiet_libraries()
    task = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    overrides = [str(override) for override in task]  # as they were typed, with their ${...}
    with friendly_errors(overrides, job_of_sweep=HydraConfig.get().mode == RunMode.MULTIRUN):
        result = run(overrides)
    group, name = config.sweep_metric.split(".")
    return float(result[group][name])


def main() -> None:
    """Entry of the command line: a single run or, with -m, a sweep."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on to us and prints nothing of its own
    with friendly_errors():
        sys.argv[1:] = [argument if argument.startswith("-") else quoted(argument) for argument in sys.argv[1:]]
        overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        wrong = unreadable(overrides)
        if wrong is not None:
            raise ConfigError(wrong)
        for sentence in repeated(overrides):
            print(sentence)
        if {"--help", "-h"} & set(sys.argv):
            Console().print(help_page(compose(overrides)), highlight=False)
            return
        job()


if __name__ == "__main__":
    main()
