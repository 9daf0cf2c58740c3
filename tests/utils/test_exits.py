"""How a command ends: its exit code, and one sentence on stderr."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from src.errors import ConfigError, NonFiniteError, SettingError
from src.utils.exits import JobFailedError, friendly_errors
from src.utils.signals import Interrupted

ROOT = Path(__file__).parents[2]
ENDS = {
    "a wrong setting": (ConfigError("ppo.lr=-1: must be\n  at least 0"), 2, "error: ppo.lr=-1: must be at least 0"),
    "a range": (SettingError("lr", -1, "at least 0"), 2, "error: lr must be at least 0, but is -1"),
    "a number": (NonFiniteError("the loss is nan"), 2, "error: the loss is nan"),
    "a full disk": (
        OSError(errno.ENOSPC, "No space left on device", "a.ckpt"), 2,
        "error: No space left on device while writing a.ckpt: make room, then the same command resumes",
    ),
    "memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: memory ran out (Default"),
    "a job": (JobFailedError("said already"), 2, "error: jobs of the sweep failed"),
    "SIGTERM": (Interrupted(signal.SIGTERM, "a.ckpt"), 143, "interrupted by SIGTERM: a.ckpt is kept"),
    "SIGINT": (Interrupted(signal.SIGINT), 130, "interrupted by SIGINT: nothing was saved"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted: the same command resumes"),
}  # fmt: skip


@pytest.mark.parametrize("what", ENDS)
def test_what_a_user_can_mend_is_one_sentence(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, sentence = ENDS[what]
    with pytest.raises(SystemExit) as ended, friendly_errors():
        raise error
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(sentence)
    assert err.count("\n") == 1


@pytest.mark.parametrize("bug", [ZeroDivisionError(), RuntimeError("a bug"), OSError(errno.EIO, "broken"), KeyError()])
def test_a_bug_keeps_its_traceback(bug: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(bug)) as raised, friendly_errors():
        raise bug
    assert raised.value is bug
    assert capsys.readouterr().err == ""


def test_a_job_of_a_sweep_says_which_and_lets_the_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(JobFailedError), friendly_errors(["ppo.lr=-1", "seed=2"], job_of_sweep=True):
        raise ConfigError("ppo.lr=-1: too low")
    assert capsys.readouterr().err == "error: job ppo.lr=-1 seed=2: ppo.lr=-1: too low\n"


LEAVES = """
import sys, threading, time
from src.errors import RewardError
from src.utils.exits import REWARD_THREAD, friendly_errors
if "given up" in sys.argv:
    threading.Thread(target=time.sleep, args=(60,), daemon=True, name=REWARD_THREAD).start()
threading.Thread(target=lambda: (time.sleep(60 if "given up" in sys.argv else 0.2), print("done"))).start()
print("shown", end="")
with friendly_errors():
    raise RewardError("no answer in time")
"""


@pytest.mark.parametrize(("argument", "out"), [("given up", "shown"), ("nothing", "showndone\n")])
def test_a_process_does_not_wait_for_the_threads_of_a_reward_that_was_given_up_on(argument: str, out: str) -> None:
    """Python waits for a pool's workers at its end; the exit code and what was printed are the same."""
    command = [sys.executable, "-c", LEAVES, argument]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, out, "error: no answer in time\n")


def test_a_password_in_an_address_is_printed_by_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), friendly_errors():
        raise ConfigError("reward.urll=http://me:s3cret@host/: there is no such key")
    assert capsys.readouterr().err == "error: reward.urll=http://...@host/: there is no such key\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_half_written_is_removed_on_a_signal(
    signum: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on Ctrl-C; afterwards the handlers are as they were."""
    before, half = signal.getsignal(signum), tmp_path / "half"

    def work() -> None:
        half.touch()
        try:
            os.kill(os.getpid(), signum)
        finally:
            half.unlink()

    with pytest.raises(SystemExit) as ended, friendly_errors():
        work()
    assert ended.value.code == 128 + signum
    assert capsys.readouterr().err.startswith(f"interrupted by {signal.Signals(signum).name}: nothing was saved")
    assert signal.getsignal(signum) == before
    assert not half.exists()


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with friendly_errors():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "run/writing.tmp"), "Is a directory: run/writing.tmp; move"),
        (
            PermissionError(errno.EACCES, "Permission denied", "run/.lock"),
            "Permission denied: run/.lock; move it away or",
        ),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk while weights are written, a folder in the place of a file, another user's folder."""
    with pytest.raises(SystemExit) as ended, friendly_errors():
        raise error
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_a_console_that_lacks_a_letter_gets_an_escape() -> None:
    """Of Rich as of print; the exit code is that of the command."""
    code = "from rich.console import Console\nfrom src.utils.exits import friendly_errors\n"
    code += "with friendly_errors():\n    print('\\u00fc')\n    Console().print('\\u2014')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LANG": "C", "PYTHONUTF8": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "\\xfc\n\\u2014\n"), ended.stderr
