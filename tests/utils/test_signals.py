"""What the end of a run by a signal says."""

from __future__ import annotations

import signal

from src.utils.signals import Interrupted


def test_the_signal_is_named_and_what_is_kept() -> None:
    kept = Interrupted(signal.SIGTERM, "logs/iteration-3.ckpt")
    assert (kept.signum, kept.kept) == (signal.SIGTERM, "logs/iteration-3.ckpt")
    assert kept.sentence().startswith("SIGTERM: logs/iteration-3.ckpt is kept")
    assert Interrupted(signal.SIGINT).sentence().startswith("SIGINT: no iteration was saved")
    for ended in (kept, Interrupted(signal.SIGINT)):
        assert "the same command" in ended.sentence()
        assert "\n" not in ended.sentence()


def test_no_handler_of_errors_takes_it_for_one() -> None:
    assert not isinstance(Interrupted(signal.SIGTERM), Exception)
