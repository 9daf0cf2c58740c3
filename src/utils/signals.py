"""The end of a command by a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


def ending() -> list[signal.Signals]:
    """The signals that ask a process to end; without SIGHUP where it is ignored, as nohup asks for."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


class Interrupted(BaseException):
    """A signal ended the run; carries its number and the path of the last checkpoint (None: none)."""

    def __init__(self, signum: int, kept: str | None = None) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.kept = signum, kept

    def sentence(self) -> str:
        """The signal, the kept checkpoint, and how to resume."""
        if self.kept is None:
            return f"{self}: nothing was saved; the same command starts again"
        return f"{self}: {self.kept} is kept; the same command resumes (resume=never starts again)"


@contextmanager
def handling(signals: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    """Handle signals within the block, in the main thread, which receives them; in other threads do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


@contextmanager
def held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Let signals wait until the end of the block, and for ever in processes that are started within it.

    A process that handles them unblocks them; before that, its imports would end by them with any code.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(signum: int, frame: FrameType | None) -> None:
    """A handler that raises `Interrupted`, once: what is half written is removed on the way out."""
    for other in ending():
        if signal.getsignal(other) is end:
            signal.signal(other, signal.SIG_IGN)
    raise Interrupted(signum)
