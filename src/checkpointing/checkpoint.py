"""Checkpoints of trainable tensors, at iteration boundaries only, each written atomically."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.checkpointing.checksum import DirectWrite, seal
from src.errors import FULL_DISK, CheckpointError, require
from src.loggers.csv import CsvTables
from src.utils.phases import phase

ROLLOUT = "rollout/"  # prefix of metrics that an iteration measures before its updates
HELD_OUT = "held_out/"  # prefix of metrics that only some iterations measure
VALIDATION = "/val_loss"  # what only the last step of a stage with a validation measures
NAME = re.compile(r"iteration-(\d+)\.ckpt")
BEST = "best.ckpt"  # a link to the best checkpoint


class IterationCheckpoint(Callback):
    """Saves `folder/iteration-N.ckpt` after every `every` batches and after the last.

    Keeps the newest `keep` and the best: the one with the highest (`best_mode` "min": lowest) value of the logged
    metric `best_metric` (None: none); `best.ckpt` is a link to it. A metric of rollouts (`rollout/...`) measures
    the policy that sampled, after N iterations, and belongs to `iteration-N.ckpt`, so the last one has none; any other
    metric belongs to the checkpoint of its iteration. The logged rows are part of a checkpoint, so tables and weights
    are always of the same iteration. Must be the last callback before `GracefulStop`.
    """

    def __init__(
        self, folder: str, every: int, keep: int, best_metric: str | None = None, best_mode: str = "max"
    ) -> None:
        require(every >= 1, "every", every, "at least 1")
        require(keep >= 1, "keep", keep, "at least 1")
        require(best_mode in ("max", "min"), "best_mode", best_mode, "max or min")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.best_metric, self.best_mode = best_metric, best_mode
        self.saved = 0  # iterations in the newest checkpoint
        self.best: tuple[int, float] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make Lightning write checkpoints directly to their path."""
        trainer.strategy.checkpoint_io = DirectWrite()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every `every` iterations; the last iteration of a stage with a final validation is saved after it."""
        measured = batch["experience"].rollout.policy_version if self._by_rollouts() else 0
        if (self.folder / f"iteration-{measured}.ckpt").is_file():
            self._update_best(trainer, measured)
        if at_end(trainer, batch_idx + 1) and trainer.enable_validation:
            return
        note_row(trainer)
        if (batch_idx + 1) % self.every == 0 or at_end(trainer, batch_idx + 1):
            self._require_logged(trainer)
            self.save(trainer, batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last iteration of a stage together with its validation."""
        done = trainer.fit_loop.total_batch_idx + 1
        if trainer.state.fn == "fit" and at_end(trainer, done):
            self._require_logged(trainer)
            self.save(trainer, done)

    @phase("saving")
    def save(self, trainer: Trainer, done: int) -> None:
        """Write the checkpoint of `done` iterations, unless it is the newest one already, and delete old ones.

        Raises `CheckpointError` when the disk is full; the previous one is unchanged.
        """
        if done == self.saved:
            return
        if not self._by_rollouts():
            self._update_best(trainer, done)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary, final = self.folder / "writing.tmp", self.folder / f"iteration-{done}.ckpt"
        try:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                seal(temporary, final)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise CheckpointError(self._no_room(final, error)) from error
        finally:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)
        self.saved = done
        if trainer.is_global_zero:
            self._tidy()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the rows that were logged."""
        for logger in trainer.loggers:
            if isinstance(logger, CsvTables):
                checkpoint["tables"] = logger.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the tables."""
        for logger in trainer.loggers:
            if isinstance(logger, CsvTables):
                logger.load_state_dict(checkpoint.get("tables"))

    def state_dict(self) -> dict[str, Any]:
        """The best checkpoint and its value, and by what it is the best."""
        return {"best": list(self.best) if self.best else None, "by": [self.best_metric, self.best_mode]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them, if the best checkpoint is in this folder and is so by the same metric."""
        best = state_dict["best"] if state_dict.get("by") == [self.best_metric, self.best_mode] else None
        if best is not None and (self.folder / f"iteration-{best[0]}.ckpt").is_file():
            self.best = (best[0], best[1])

    def _by_rollouts(self) -> bool:
        """Whether `best_metric` is measured before the updates of its iteration."""
        return self.best_metric is not None and self.best_metric.startswith(ROLLOUT)

    def _require_logged(self, trainer: Trainer) -> None:
        """Refuse a name that nobody has logged until a checkpoint is due; what is measured more rarely comes later."""
        name, logged = self.best_metric, trainer.callback_metrics
        if name is None or name.startswith(HELD_OUT) or (trainer.enable_validation and name.endswith(VALIDATION)):
            return
        require(name in logged, "best_metric", name, f"null or a number that is logged: {', '.join(sorted(logged))}")

    def _update_best(self, trainer: Trainer, done: int) -> None:
        """Make the checkpoint of `done` iterations the best if its `best_metric` is better than that of the best.

        A checkpoint of an iteration that has not measured it is never the best.
        """
        logged = trainer.callback_metrics if trainer.validating else logged_now(trainer)
        if self.best_metric is None or self.best_metric not in logged:
            return
        value = float(logged[self.best_metric])
        sign = 1 if self.best_mode == "max" else -1
        if value == value and (self.best is None or sign * value > sign * self.best[1]):
            self.best = (done, value)

    def _tidy(self) -> None:
        """Delete all but the newest and the best, and link `best.ckpt`."""
        best = self.folder / f"iteration-{self.best[0]}.ckpt" if self.best else None
        for old in checkpoints(self.folder)[: -self.keep]:
            if old != best:
                old.unlink()
        if best is not None:
            link = self.folder / "best.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(best.name)
            link.replace(self.folder / BEST)

    def _no_room(self, final: Path, error: OSError) -> str:
        """The message for a full disk."""
        saved = checkpoints(self.folder)
        kept = f"{saved[-1]} is kept as it was" if saved else "there is no earlier one"
        return f"{final} could not be written ({error.strerror}): {kept}; make room, then the same command resumes"


def at_end(trainer: Trainer, done: int) -> bool:
    """Whether this is the last iteration."""
    return done == trainer.num_training_batches or trainer.should_stop


def logged_now(trainer: Trainer) -> dict[str, Any]:
    """The numbers that this iteration has logged; `callback_metrics` also keeps those of earlier ones."""
    return dict(trainer._logger_connector.metrics["callback"])


def note_row(trainer: Trainer) -> None:
    """Log this iteration's row before the checkpoint is written; Lightning logs it after that."""
    connector = trainer._logger_connector
    if connector.should_update_logs:
        row = {name: float(value) for name, value in connector.metrics["log"].items()}
        step = int(row.pop("step", trainer.fit_loop.epoch_loop._batches_that_stepped))
        for logger in trainer.loggers:
            if isinstance(logger, CsvTables):
                logger.log_metrics(row, step)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; files of other names, such as copies, are none."""
    found = {int(name[1]): path for path in folder.glob("iteration-*.ckpt") if (name := NAME.fullmatch(path.name))}
    return [found[done] for done in sorted(found) if found[done].is_file()]
