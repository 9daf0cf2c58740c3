"""How a command ends: one sentence on stderr for a user's error, and a nonzero exit code."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from safetensors import SafetensorError

from src.errors import FULL_DISK, UserError, without_secrets
from src.utils.signals import Interrupted, end, ending, handling
from src.utils.terminal import print_any_letter, say

IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM, errno.EROFS)
REWARD_THREAD = "reward"  # the name of a thread that waits for a reward

log = logging.getLogger(__name__)


class JobFailedError(RuntimeError):
    """One job of a sweep failed, and has printed why."""


@contextmanager
def friendly_errors(overrides: list[str] | None = None, job_of_sweep: bool = False) -> Iterator[None]:
    """Turn errors that a user can mend into one sentence on stderr and exit code 2, signals into 128 + their number.

    SIGTERM and SIGHUP raise `Interrupted` in the block, so that files that are half written are removed.
    A job of a sweep prints its sentence at once and raises `JobFailedError`, so that the other jobs still run.
    """
    print_any_letter()
    try:
        with handling([signum for signum in ending() if signum != signal.SIGINT], end):
            yield
    except JobFailedError:
        say("error: jobs of the sweep failed, for the reasons above; the others have their results", sys.stderr)
        leave(2)
    except (UserError, RuntimeError) as error:
        sentence = one_sentence(error) if isinstance(error, UserError) else _out_of_memory(error)
        if sentence is None:
            raise
        if job_of_sweep:
            say(f"error: job {' '.join(overrides or [])}: {sentence}", sys.stderr)
            raise JobFailedError(sentence) from None
        say(f"error: {sentence}", sys.stderr)
        leave(2)
    except (OSError, SafetensorError) as error:
        sentence = _of_system(error)
        if sentence is None:
            raise
        say(f"error: {sentence}", sys.stderr)
        leave(2)
    except Interrupted as interrupted:
        say(f"interrupted by {interrupted.sentence()}", sys.stderr)
        leave(128 + interrupted.signum)
    except KeyboardInterrupt:
        say("interrupted: the same command resumes", sys.stderr)
        leave(130)


def leave(code: int) -> NoReturn:
    """End the process; at once if a reward that was given up on has left threads, for which Python would wait."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    given_up = any(thread.name == REWARD_THREAD for thread in others)
    if given_up and not all(thread.daemon for thread in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code) from None


def one_sentence(error: BaseException) -> str:
    """The message on one line, without passwords in addresses."""
    return without_secrets(" ".join(str(error).split()))


def _of_system(error: Exception) -> str | None:
    """What the system refused to write or open, and how to mend it; None for any other error."""
    coded = re.search(r"os error (\d+)", str(error))  # of safetensors, whose error is no OSError
    number = error.errno if isinstance(error, OSError) else int(coded[1]) if coded else None
    name = f" {error.filename}" if isinstance(error, OSError) and error.filename else ""
    if number in FULL_DISK:
        return f"{os.strerror(number)}{name and f' while writing{name}'}: make room, then the same command resumes"
    if number in IN_THE_WAY and name:
        return f"{os.strerror(number)}:{name}; move it away or change its permissions, then give the same command again"
    return None


def _out_of_memory(error: RuntimeError) -> str | None:
    """The message when memory ran out; None for any other error."""
    from src.utils.out_of_memory import out_of_memory  # imports torch, which is loaded already if memory ran out

    if not out_of_memory(error):
        return None
    return (
        f"memory ran out ({one_sentence(error)[:200]}): smaller batches (the stage's batch_size, "
        f"rollout.scoring_batch_size) or shorter texts take less; `python -m src.plan` estimates PPO's memory; the "
        f"last checkpoint is kept"
    )


def attempt(what: str, work: Callable[[], object]) -> None:
    """Do work that nothing depends on, as a picture of a run; what goes wrong is one sentence in the log."""
    try:
        work()
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{error!r}"
        log.warning("%s could not be written (%s); the run is not affected", what, reason)
