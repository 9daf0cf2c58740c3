"""Starting the processes of a distributed run, and its Lightning strategy."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.multiprocessing as mp
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import ProcessRaisedException
from torch.multiprocessing.spawn import ProcessException

from src.errors import RankError
from src.utils.distributed import broadcast_
from src.utils.exits import leave, one_sentence
from src.utils.signals import Interrupted, end, ending, handling, held_back

GRACE = 10.0  # seconds for the other ranks to end when one has failed, and again after SIGTERM
FINISHED = ""  # the report of a rank that has nothing to say
REPORTED = 2  # exit code of a rank that has reported an error; after a signal: 128 + its number


class SummedGradients(DDPStrategy):
    """Lightning's DDP without its wrapper: the modules sum their gradients themselves, once per optimizer step.

    The wrapper averages over ranks in every backward pass, and must know in advance which parameters get gradients.
    Here a rank's loss is its part of one sum, a step has many backward passes, and the roles alternate.
    """

    def configure_ddp(self) -> None:
        """Start all ranks from the weights of rank 0."""
        assert self.model is not None  # Lightning has set it
        broadcast_(parameter for parameter in self.model.parameters() if parameter.requires_grad)


def launched() -> bool:
    """Whether this process is one of several that `in_processes`, torchrun or Slurm has started."""
    return "LOCAL_RANK" in os.environ or SLURMEnvironment.detect()


def in_processes(
    count: int, function: Callable[[Any], Any], argument: Any, reportable: tuple[type[Exception], ...]
) -> None:
    """`function(argument)` in `count` new processes on this machine, which are Lightning's ranks.

    Raises `RankError` when a rank fails, with its message if the error is `reportable`; the other ranks are ended. A
    signal is forwarded to the ranks, which end gracefully; then, whatever they end with, raises `Interrupted`, unless
    they had finished.
    """
    reports = mp.get_context("spawn").SimpleQueue()
    port = find_free_network_port()
    started: list[Any] = []
    failure: ProcessException | None = None
    with _passing_on(started) as received:
        with held_back(ending()):
            context = mp.start_processes(_as_rank, (port, function, argument, reportable, reports), count, join=False)
        started += context.processes
        for signum in received:  # before there was anyone to pass it on to
            _send(started, signum)
        try:
            while not context.join(grace_period=GRACE):
                pass
        except ProcessException as error:
            failure = error
    given = []
    while not reports.empty():
        given.append(reports.get())
    _conclude(given, received, failure, count)


def _conclude(given: list[Any], received: list[int], failure: ProcessException | None, count: int) -> None:
    """Return if the ranks have finished; else raise what they have reported, or what has become of them."""
    words = [report for report in given if report != FINISHED]
    if failure is None and not words and len(given) == count:
        return
    ended = next((report for report in words if isinstance(report, tuple)), None)
    if received or (words and words[0] == ended):
        raise Interrupted(*(ended or (received[0], None)))
    if words:
        raise RankError(words[0])
    if failure is None:
        raise RankError(f"of {count} ranks {len(given)} finished, and the others ended without a word")
    if isinstance(failure, ProcessRaisedException):  # a bug: keep its traceback
        raise failure
    raise RankError(f"{failure.msg}, one of {count} ranks, and the others were ended with it")


@contextmanager
def _passing_on(processes: list[Any]) -> Iterator[list[int]]:
    """Forward signals that end to the ranks within the block; the list gets each of them."""
    received: list[int] = []

    def pass_on(signum: int, frame: Any) -> None:
        received.append(signum)
        _send(processes, signum)

    with handling(ending(), pass_on):
        yield received


def _send(processes: list[Any], signum: int) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signum)


def _as_rank(
    rank: int,
    port: int,
    function: Callable[[Any], Any],
    argument: Any,
    reportable: tuple[type[Exception], ...],
    reports: Any,
) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        for signum in ending():
            signal.signal(signum, end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ending())  # one that has waited is raised here
        function(argument)
    except reportable as error:
        reports.put(one_sentence(error))
        leave(REPORTED)
    except Interrupted as interrupted:
        reports.put((interrupted.signum, interrupted.kept))
        leave(128 + interrupted.signum)
    reports.put(FINISHED)
