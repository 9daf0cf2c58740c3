"""How a command ends: its exit code, and one sentence on stderr."""

from __future__ import annotations

import errno
import signal

import pytest

from src.errors import ConfigError, NonFiniteError, SettingError
from src.utils.exits import JobFailedError, friendly_errors
from src.utils.signals import Interrupted

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
    "SIGINT": (Interrupted(signal.SIGINT), 130, "interrupted by SIGINT: no iteration was saved"),
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
