"""Signals: the running iteration is finished and saved, a second signal drops it, and the run goes on from there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback

from src.checkpointing.checkpoint import IterationCheckpoint, checkpoints
from src.checkpointing.graceful_stop import GracefulStop, requeue
from src.errors import SettingError
from src.utils.signals import Interrupted
from tests.tiny import FOREIGN_WARNINGS, fit, make_maker, make_module, make_roles, write_lm

pytestmark = FOREIGN_WARNINGS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


class SendAtEnd(Callback):
    """Sends a signal after the last iteration has been looked at, and before training ends."""

    def __init__(self, signum: int) -> None:
        self.signum = signum

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        os.kill(os.getpid(), self.signum)


class Send(Callback):
    """Sends signals to this process in the second iteration: after its rollout, or when its checkpoint is written."""

    def __init__(self, *signals: int, while_saving: bool = False, then_hang: bool = False) -> None:
        self.signals, self.while_saving, self.then_hang = signals, while_saving, then_hang

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and not self.while_saving:
            self.send()
            while self.then_hang:
                time.sleep(0.01)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if self.while_saving:
            self.send()
            self.while_saving = False

    def send(self) -> None:
        for signum in self.signals:
            os.kill(os.getpid(), signum)


def interrupted(
    base: str, folder: Path, send: Callback, *, every: int = 10, grace: float = 300.0
) -> tuple[int, list[str]]:
    """The signal that a run of four iterations ended by, and its checkpoints; handlers are as they were."""
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    stop = GracefulStop(grace)
    callbacks = (send, IterationCheckpoint(str(folder), every=every, keep=9), stop)
    with pytest.raises(Interrupted) as raised, stop.listening():
        fit(make_module(make_roles(base), iterations=4), folder, maker=make_maker(), iterations=4, callbacks=callbacks)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert not list(folder.glob("*.tmp"))
    return raised.value.signum, [path.stem for path in checkpoints(folder)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_running_iteration_is_finished_and_saved(base: str, signum: int, tmp_path: Path) -> None:
    assert interrupted(base, tmp_path, Send(signum)) == (signum, ["iteration-2"])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_between_the_last_iteration_and_the_end_of_training_ends_the_run(
    base: str, signum: int, tmp_path: Path
) -> None:
    """It was acknowledged, and then nobody looked at it."""
    assert interrupted(base, tmp_path, SendAtEnd(signum)) == (signum, ["iteration-4"])


def test_a_signal_during_a_checkpoint_ends_the_run_after_it(base: str, tmp_path: Path) -> None:
    found = interrupted(base, tmp_path, Send(signal.SIGTERM, while_saving=True), every=1)
    assert found == (signal.SIGTERM, ["iteration-1"])


def test_a_second_signal_drops_the_iteration(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.checkpointing.graceful_stop.SAME", 0.0)
    assert interrupted(base, tmp_path, Send(signal.SIGTERM, signal.SIGTERM), every=1)[1] == ["iteration-1"]


def test_a_signal_that_comes_twice_at_once_is_one(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends Ctrl-C to every process, and the parent of several ranks passes it on to them."""
    monkeypatch.setattr("src.checkpointing.graceful_stop.SAME", 60.0)
    assert interrupted(base, tmp_path, Send(signal.SIGINT, signal.SIGINT)) == (signal.SIGINT, ["iteration-2"])


def test_an_iteration_that_takes_too_long_is_dropped(base: str, tmp_path: Path) -> None:
    send = Send(signal.SIGTERM, then_hang=True)
    assert interrupted(base, tmp_path, send, every=1, grace=0.05) == (signal.SIGTERM, ["iteration-1"])


def test_while_a_policy_is_tested_signals_are_not_lightnings() -> None:
    """Lightning's handler for several ranks calls a collective; another rank may be within another one."""
    trainer: Any = SimpleNamespace(_accelerator_connector=SimpleNamespace(cluster_environment=None))
    stop = GracefulStop(300)
    with stop.listening():
        signal.signal(signal.SIGTERM, lambda signum, frame: None)  # as Lightning does before a test starts
        stop.on_test_start(trainer, trainer)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_outside_the_iterations_a_signal_ends_the_run_at_once() -> None:
    stop = GracefulStop(300)
    with pytest.raises(Interrupted), stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SettingError, match="grace_seconds"):
        GracefulStop(0)


def test_slurms_signal_saves_at_the_boundary_and_requeues_the_job(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hpc_ckpt file is left, which Lightning would prefer to every newer checkpoint."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in {"NTASKS": "1", "JOB_ID": "17", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = interrupted(base, tmp_path / "run", Send(signal.SIGUSR1))
    assert found == (signal.SIGUSR1, ["iteration-2"])
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert not list(tmp_path.rglob("hpc_ckpt*"))


def test_a_job_that_cannot_be_requeued_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without the program, as in many containers, and where it refuses."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", str(tmp_path))
    requeue()
    assert "job 17 could not be requeued: [Errno 2] No such file or directory: 'scontrol'" in capfd.readouterr().err
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "scontrol").chmod(0o755)
    requeue()
    assert "job 17 could not be requeued: " in (said := capfd.readouterr().err)
    assert "exit status 3" in said
