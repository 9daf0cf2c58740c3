"""Processes that end by a signal, also while they are set up, and those that end without a word."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from src.errors import ConfigError, RankError
from src.utils.launch import in_processes
from src.utils.signals import Interrupted

pytestmark = pytest.mark.slow  # each starts two interpreters


def _finish(folder: str) -> None:
    Path(folder, os.environ["LOCAL_RANK"]).touch()


def _wait(folder: str) -> None:
    _finish(folder)
    time.sleep(60)


def _leave(folder: str) -> None:
    if os.environ["LOCAL_RANK"] == "1":
        raise SystemExit(0)


def _refuse(folder: str) -> None:
    raise ConfigError("a sentence")


def signals_when(ready: Path | None, signum: int) -> None:
    """Send a signal to this process as soon as a file is there (None: at once)."""

    def send() -> None:
        while ready is not None and not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    threading.Timer(0.05, send).start()


def test_processes_that_finish_raise_nothing(tmp_path: Path) -> None:
    in_processes(2, _finish, str(tmp_path), (ConfigError,))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["while they are set up", "while they work"])
def test_a_signal_that_was_passed_on_is_an_interruption(when: str, signum: int, tmp_path: Path) -> None:
    """Not a rank's failure, and never a finished run. Handlers are as they were."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    signals_when(tmp_path / "0" if "work" in when else None, signum)
    with pytest.raises(Interrupted) as ended:
        in_processes(2, _wait, str(tmp_path), (ConfigError,))
    assert ended.value.signum == signum
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_process_that_ends_without_a_word_is_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="of 2 ranks 1 finished, and the others ended without a word"):
        in_processes(2, _leave, str(tmp_path), (ConfigError,))


def test_a_sentence_of_a_process_is_that_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"^a sentence$"):
        in_processes(2, _refuse, str(tmp_path), (ConfigError,))
