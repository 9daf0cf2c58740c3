"""Base of the builders of the stages."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.callbacks.progress import StageProgress
from src.checkpointing.checkpoint import IterationCheckpoint
from src.checkpointing.graceful_stop import GracefulStop
from src.config.schema import Optimization, Run, Sharded
from src.config.validate import refuse
from src.errors import ConfigError
from src.models.settings import ModelSettings
from src.modules.lr_schedule import lr_schedule
from src.stages.checks import check_quantized, refuse_damaged
from src.stages.code import code_of
from src.stages.objects import instantiate
from src.types import Corpus
from src.utils.device import accelerator
from src.utils.launch import launched
from src.utils.nonfinite import FiniteGuard

AnyRun = TypeVar("AnyRun", bound=Run)


class Stage(ABC, Generic[AnyRun]):
    """The objects of one stage. Those without weights are made at once, so that their errors come early.

    `check` checks the models without loading weights; `build` loads or makes them.
    """

    unit: ClassVar[str]  # unit of the progress bar

    def __init__(self, run: AnyRun) -> None:
        self.run = run
        self.model: ModelSettings = instantiate(run.model, "model")
        if isinstance(run.trainer.strategy, Sharded):
            self.model = replace(self.model, fast_cpu=False)  # these kernels read weights past their modules
        extra = (run.callbacks.model_extra or {}).items()
        self.code: dict[str, str] = {}
        self.user_callbacks = [instantiate(node, f"callbacks.{name}") for name, node in extra if node is not None]

    @property
    @abstractmethod
    def optimization(self) -> Optimization:
        """The block of the stage's training settings."""

    @abstractmethod
    def build(self, corpus: Corpus, folder: Path) -> tuple[LightningModule, LightningDataModule]:
        """The module and its data."""

    def check(self) -> None:
        """Raise `ConfigError` or `ModelError` for unusable settings, before weights are loaded or models trained.

        Sets `code` to the fingerprints of the code as it is now; a file may be edited while the stage runs.
        """
        unknown = sorted(set(self.run.trainer.model_extra or {}) - set(inspect.signature(Trainer).parameters))
        if unknown:
            raise ConfigError(f"trainer.{unknown[0]}: Lightning's Trainer has no such argument")
        accelerator(self.run.trainer.accelerator)
        check_quantized(self.run, self.model.quantize)
        nodes = self.run.trainer.num_nodes
        if nodes > 1 and not launched():
            refuse("trainer.num_nodes", nodes, "start the processes by torchrun or srun")
        for node in [node for node in ("model", "reward") if hasattr(self.run, node)]:
            path = getattr(getattr(self.run, node), "path", None)
            refuse_damaged(f"{node}.path={path}", path)
        self.code = code_of(self.run)

    def check_training(self) -> None:
        """`check`, and what a chat or an evaluation with the same settings does not need."""
        self.check()
        _ = self._made_loggers  # a missing package is said before anything is trained

    def set_paths(self, model: str | None = None, reward: str | None = None) -> None:
        """Set the folders of models that were trained for this run."""
        if model is not None:
            self.model = replace(self.model, path=model)
            self.run = _with(self.run, "model", path=model)
        if reward is not None:
            self.run = _with(self.run, "reward", path=reward)

    def own_callbacks(self, folder: Path) -> list[Callback]:
        """The callbacks of this stage only."""
        return []

    def callbacks(self, folder: Path) -> list[Callback]:
        """All callbacks in their required order: checkpoints after those that change the state, signals last."""
        settings = self.run.callbacks
        return [
            *self.own_callbacks(folder),
            StageProgress(self.unit),
            *self.user_callbacks,
            IterationCheckpoint(str(folder / "checkpoints"), **settings.checkpoint.model_dump()),
            GracefulStop(settings.stop.grace_seconds),
        ]

    def corpus(self) -> Corpus:
        """The data set; its tokens are counted by the model's tokenizer unless it names another."""
        corpus: Corpus = instantiate(self.run.data, "data", **self._tokenizer())
        return corpus

    def trainer(self, callbacks: list[Callback], folder: Path) -> Trainer:
        """Lightning's Trainer for one epoch, as long as the stage. Raises `ConfigError` for refused settings."""
        settings = self.run.trainer
        try:
            return Trainer(
                accelerator=accelerator(settings.accelerator),
                devices=settings.devices,
                num_nodes=settings.num_nodes,
                precision=settings.precision,
                strategy=instantiate(settings.strategy, "trainer.strategy") or "auto",
                callbacks=callbacks,
                logger=self._loggers(folder),
                max_epochs=1,
                log_every_n_steps=self.optimization.log_every,
                num_sanity_val_steps=0,
                enable_checkpointing=False,
                enable_model_summary=False,
                default_root_dir=folder,
                **(settings.model_extra or {}),
            )
        except (TypeError, ValueError, RuntimeError) as error:  # MisconfigurationException derives from none of these
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error

    def guard(self, folder: Path) -> FiniteGuard:
        """The guard against numbers that are not finite."""
        return FiniteGuard(self.run.nonfinite.max_skipped_in_a_row, str(folder / "nonfinite"))

    def lr_schedule(self, steps: int) -> Callable[[Optimizer], LRScheduler]:
        """The learning-rate schedule of the stage over `steps` steps."""
        settings = self.optimization
        return partial(lr_schedule, name=settings.lr_schedule, warmup=settings.warmup, steps=steps)

    def _tokenizer(self) -> dict[str, Any]:
        """The tokenizer argument of a table of rows that names none, and whether its code may be run."""
        lacks = "tokenizer" in type(self.run.data).model_fields and getattr(self.run.data, "tokenizer", None) is None
        if not lacks or self.model.path is None:
            return {}
        return {"tokenizer": self.model.path, "trusted": self.model.trust_remote_code}

    @cached_property
    def _made_loggers(self) -> list[Any]:
        """The loggers; those of a run's folder as factories."""
        nodes = (self.run.logger.model_extra or {}).items()
        return [instantiate(node, f"logger.{name}") for name, node in nodes if node is not None]

    def _loggers(self, folder: Path) -> list[Any]:
        made = self._made_loggers
        return [logger(save_dir=str(folder)) if isinstance(logger, partial) else logger for logger in made]


def _with(run: AnyRun, node: str, **values: Any) -> AnyRun:
    """The configuration with changed values in a node."""
    return run.model_copy(update={node: getattr(run, node).model_copy(update=values)})
