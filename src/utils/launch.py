"""Starting the processes of a distributed run, and its Lightning strategy."""

from __future__ import annotations

import os
import signal
import threading
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
from src.utils.signals import Interrupted

GRACE = 10.0  # seconds for the other ranks to end when one has failed, and again after SIGTERM
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
    signal is forwarded to the ranks, which end gracefully; then raises `Interrupted`.
    """
    reports = mp.get_context("spawn").SimpleQueue()
    port = find_free_network_port()
    context = mp.start_processes(_as_rank, (port, function, argument, reportable, reports), count, join=False)
    try:
        with _passing_on(context.processes):
            while not context.join(grace_period=GRACE):
                pass
    except ProcessException as error:
        report = None if reports.empty() else reports.get()
        if isinstance(report, str):
            raise RankError(report) from None
        if report is not None:
            raise Interrupted(*report) from None
        if isinstance(error, ProcessRaisedException):  # a bug: keep its traceback
            raise
        raise RankError(f"{error.msg}, one of {count} ranks, and the others were ended with it") from None


@contextmanager
def _passing_on(processes: list[Any]) -> Iterator[None]:
    """Forward SIGTERM and SIGINT to the ranks within the block; only in the main thread, which receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(signum: int, frame: Any) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


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
        function(argument)
    except reportable as error:
        reports.put(one_sentence(error))
        leave(REPORTED)
    except Interrupted as interrupted:
        reports.put((interrupted.signum, interrupted.kept))
        leave(128 + interrupted.signum)
