"""One run of one stage: from its configuration to its result."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from src.checkpointing.checkpoint import checkpoints
from src.checkpointing.checksum import seal_models
from src.checkpointing.graceful_stop import GracefulStop
from src.checkpointing.metadata import RunMetadata
from src.checkpointing.resume import find_checkpoint, plain_config
from src.config.compose import compose, restored
from src.config.schema import PPORun, Run
from src.data.table_corpus import TableCorpus
from src.errors import ConfigError
from src.memory.report import log_memory
from src.report.page import PAGE, write_page
from src.runs.folder import FINISHED, own_folder, run_folder
from src.runs.prerequisites import train_missing
from src.runs.report import MENDABLE, endings, git_revision, make_result, report, write_json
from src.stages.base import Stage
from src.stages.builders import stage_of
from src.stages.code import own_code
from src.utils.exits import attempt
from src.utils.launch import in_processes, launched
from src.utils.output import set_up_output
from src.utils.signals import Interrupted
from src.utils.statistics import Figure
from src.utils.terminal import say

log = logging.getLogger(__name__)


def start(overrides: list[str]) -> dict[str, Any]:
    """Compose, check, train the models that are missing, and run."""
    return start_run(compose(overrides))


def start_run(run: Run) -> dict[str, Any]:
    """The same for a composed configuration."""
    set_up_output()
    folder = run_folder(Path(run.log_dir) / run.stage, run.name, run.overrides, run.resume)
    run = run.model_copy(update={"run_dir": str(folder)})
    stage = stage_of(run)
    stage.check_training()
    if run.trainer.strategy is not None and launched():
        _refuse_what_ranks_cannot_share(run)
    find_checkpoint(run, stage.code, tell=False)  # its errors come before a model is trained for this run
    stage.set_paths(**train_missing(run, train))
    if rank_zero_only.rank == 0:
        say(f"stage {run.stage} -> {folder}")
    result = train(stage.run, stage)
    if rank_zero_only.rank == 0:
        say("\n".join(endings(folder)))
    return result


def train(run: Run, stage: Stage[Any] | None = None) -> dict[str, Any]:
    """Run the stage in `run.run_dir`; returns the content of `result.json`.

    Several processes are started here and nowhere else; each of them calls this function again, as one rank.
    """
    folder = Path(run.run_dir or "")
    try:
        if run.trainer.strategy is not None and not launched():
            in_processes(run.trainer.devices, _as_rank, run.plain(), MENDABLE)
            return json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        if stage is None:
            stage = stage_of(run)
            stage.check_training()
        with ExitStack() as held:
            return _train(stage, folder, held)
    except Interrupted as interruption:
        saved = checkpoints(folder / "checkpoints")
        interruption.kept = str(saved[-1]) if saved else None
        raise


def _as_rank(content: dict[str, Any]) -> None:
    """`train` in a separate process, from a configuration in plain types."""
    train(restored(content))


def _train(stage: Stage[Any], folder: Path, held: ExitStack) -> dict[str, Any]:
    """The part of one process; `held` releases the folder at the end, also after an error."""
    started, run = time.perf_counter(), stage.run
    set_up_output()
    metadata = RunMetadata(plain_config(run), stage.code, git_revision(), run.allow_config_change)
    trainer = stage.trainer([metadata, *stage.callbacks(folder)], folder)
    checkpoint = find_checkpoint(run, stage.code, tell=trainer.is_global_zero)
    corpus = stage.corpus()
    if trainer.is_global_zero:
        _make_folder(folder, run, held)
        if isinstance(run, PPORun):
            log_memory(run)
        if isinstance(corpus, TableCorpus):
            log.info(corpus.report())
            write_json(folder / "data.json", corpus.account)
    module, data = stage.build(corpus, folder)
    try:
        with _listening(trainer):
            for logger in trainer.loggers:
                logger.log_hyperparams(run.plain())
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            with getattr(trainer.strategy, "collected", nullcontext)():  # of shards
                if trainer.is_global_zero:
                    module.save(folder)
            trainer.test(module, datamodule=data, verbose=False)
            figures = module.result()
            attempt("the result on the boards", lambda: _log_figures(trainer, figures))
    finally:
        _close(trainer)
    result = make_result(run, figures, time.perf_counter() - started) | {"code": own_code(stage.code)}
    if trainer.is_global_zero:
        seal_models(folder)
        write_json(folder / FINISHED, result)
        report(module)
        attempt(PAGE, lambda: write_page(folder))
    return result


def _make_folder(folder: Path, run: Run, held: ExitStack) -> None:
    """Make the run's folder with its configuration, and lock it until `held` is closed or the process ends.

    Raises `ConfigError` when the folder is not writable or another process uses it.
    """
    try:
        held.callback(own_folder(folder).release)
    except OSError as error:
        raise ConfigError(f"log_dir={run.log_dir}: cannot write to {folder} ({error.strerror})") from error
    OmegaConf.save(OmegaConf.create(run.plain()), folder / "config.tmp")
    (folder / "config.tmp").replace(folder / "config.yaml")


def _log_figures(trainer: Trainer, result: Mapping[str, Mapping[str, Figure]]) -> None:
    """Give the result to the loggers that keep one, as `ppo.score`."""
    figures = {f"{group}.{name}": figure.value for group, row in result.items() for name, figure in row.items()}
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if hasattr(logger, "log_figures"):
            logger.log_figures(figures)


def _close(trainer: Trainer) -> None:
    """Finish the open run of wandb or trackio, or the next job of a sweep would write into it."""
    for logger in trainer.loggers:
        finish = getattr(logger.experiment, "finish", None)
        if finish is not None:
            finish()


def _listening(trainer: Trainer) -> AbstractContextManager[None]:
    """The signal handlers of the run's callbacks."""
    stops = [callback for callback in trainer.callbacks if isinstance(callback, GracefulStop)]
    return stops[0].listening() if stops else nullcontext()


def _refuse_what_ranks_cannot_share(run: Run) -> None:
    """Refuse what processes started by torchrun or Slurm would have to agree on, as they cannot communicate yet."""
    if run.resume == "never":
        raise ConfigError(
            "resume=never: processes that torchrun or Slurm has started may choose different folders; give a new name"
        )
    missing: Mapping[str, bool] = {
        "model": run.stage != "sft" and run.model.path is None,
        "reward": isinstance(run, PPORun) and getattr(run.reward, "path", "") is None,
    }
    for key in [key for key, lacks in missing.items() if lacks]:
        raise ConfigError(
            f"{key}.path must be given to processes that torchrun or Slurm has started: run the same command without "
            f"them once to train the missing model"
        )
