"""What the end of a run by a signal says."""

from __future__ import annotations

import os
import signal

from src.utils.signals import Interrupted, end, handling


def test_the_signal_is_named_and_what_is_kept() -> None:
    kept = Interrupted(signal.SIGTERM, "logs/iteration-3.ckpt")
    assert (kept.signum, kept.kept) == (signal.SIGTERM, "logs/iteration-3.ckpt")
    assert kept.sentence().startswith("SIGTERM: logs/iteration-3.ckpt is kept")
    assert Interrupted(signal.SIGINT).sentence().startswith("SIGINT: nothing was saved")
    for ended in (kept, Interrupted(signal.SIGINT)):
        assert "the same command" in ended.sentence()
        assert "\n" not in ended.sentence()


def test_no_handler_of_errors_takes_it_for_one() -> None:
    assert not isinstance(Interrupted(signal.SIGTERM), Exception)


def test_the_first_signal_is_raised_and_the_next_ignored_until_the_handlers_are_as_they_were() -> None:
    """What ends a command must not be ended in the middle; other signals keep their handlers."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    raised = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            raised.append(interrupted.signum)
            assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]

    with handling([signal.SIGTERM, signal.SIGHUP], end):
        work()
    assert raised == [signal.SIGTERM]
    assert {signum: signal.getsignal(signum) for signum in before} == before
