"""Graceful stop on SIGTERM, SIGHUP, Ctrl-C or Slurm's signal: finish the iteration, save, and say how to resume."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from src.checkpointing.checkpoint import IterationCheckpoint, at_end
from src.errors import require
from src.utils.distributed import gather
from src.utils.signals import Interrupted, ending, handling

SAME = 1.0  # seconds within which signals count as one: a terminal sends Ctrl-C to every process, a parent may too


class GracefulStop(Callback):
    """Ends the run at the next iteration boundary after a signal; at once after a second one or `grace_seconds`.

    In a Slurm job with auto-requeue the requeue signal (SIGUSR1 unless configured) does the same and then requeues the
    job. Lightning alone would save in the middle of an iteration, to a file that it later prefers to every newer
    checkpoint. Must come after `IterationCheckpoint`.
    """

    def __init__(self, grace_seconds: float) -> None:
        require(grace_seconds > 0, "grace_seconds", grace_seconds, "greater than 0")
        self.grace_seconds = grace_seconds
        self.received: int | None = None
        self._received_at = 0.0
        self._overdue = False
        self.learning = False  # True within the iterations; elsewhere there is nothing to finish
        self.requeue_signal: int | None = None
        self._timer: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the block, in the main thread; in other threads do nothing."""
        try:
            with handling(ending(), self._receive):
                yield
        finally:
            self._stop_waiting()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the handlers again, as Lightning has replaced them; from here on there is an iteration to finish."""
        self.learning = True
        self._take_signals(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the handlers again, as Lightning has replaced them."""
        self._take_signals(trainer)

    def _take_signals(self, trainer: Trainer) -> None:
        """Take the signals from Lightning, whose handler waits for all ranks, also while they wait for one another."""
        if signal.getsignal(signal.SIGINT) != self._receive:
            return  # not listening
        signal.signal(signal.SIGTERM, self._receive)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeue_signal = environment.requeue_signal
            signal.signal(self.requeue_signal, self._receive)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at the end of an iteration; after the last one of a stage with a final validation, wait for it."""
        if not (at_end(trainer, batch_idx + 1) and trainer.enable_validation):
            self._end(trainer, batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the final validation."""
        if trainer.state.fn == "fit":
            self._end(trainer, trainer.fit_loop.total_batch_idx + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once from here on, as the rest of a run is short to repeat; now if a signal came since the end."""
        self.learning = False
        self._stop(trainer)

    def _end(self, trainer: Trainer, done: int) -> None:
        """Save and stop if any rank has received a signal."""
        if self._received_anywhere() is not None:
            for callback in trainer.callbacks:
                if isinstance(callback, IterationCheckpoint):
                    callback.save(trainer, done)
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        """Raise `Interrupted` if any rank has received a signal; what is learned is saved."""
        self.received = self._received_anywhere()
        if self.received is None:
            return
        self._stop_waiting()
        if self.received == self.requeue_signal and trainer.is_global_zero:
            requeue()
        raise Interrupted(self.received)

    def _received_anywhere(self) -> int | None:
        """The signal that a rank has received, the first rank's first."""
        return next((signum for signum in gather(self.received) if signum is not None), None)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        """Remember the first signal; raise on the second, or when there is nothing to finish."""
        if self.received is not None and not self._overdue and time.monotonic() - self._received_at < SAME:
            return
        if self.received is not None or not self.learning:
            raise Interrupted(self.received or signum)
        self.received, self._received_at = signum, time.monotonic()
        what = "stopping: the running iteration is finished and saved first"
        say(f"\n{signal.Signals(signum).name}, {what},\n  {self.grace_seconds:g} s at most; a second signal drops it\n")
        self._timer = threading.Timer(self.grace_seconds, self._drop, (signum,))
        self._timer.daemon = True
        self._timer.start()

    def _drop(self, signum: int) -> None:
        self._overdue = True
        os.kill(os.getpid(), signum)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def say(text: str) -> None:
    """Write to stderr from a signal handler, where `print` is not safe."""
    os.write(2, text.encode())


def requeue() -> None:
    """Requeue this Slurm job; the same command then resumes from its checkpoint."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"job {job} could not be requeued: {error}\n")
    else:
        say(f"job {job} is requeued\n")
