"""Starting the processes of a run that has several, and the strategy by which Lightning lets them train together."""

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
from src.utils.signals import Interrupted

GRACE = 10.0  # seconds that the others have to end by themselves when a rank has failed, and again after SIGTERM
MENDED = 2  # exit code of a rank that said what is wrong; of one that a signal ended: 128 + its number


class SummedGradients(DDPStrategy):
    """Lightning's DDP without its wrapper: the modules sum their gradients themselves, once per optimizer step.

    The wrapper averages over ranks, in every backward pass, and wants to know beforehand which parameters take part.
    Here a rank's loss is its part of one sum, a step has many backward passes, and roles take turns.
    """

    def configure_ddp(self) -> None:
        """Start all ranks from the weights of rank 0."""
        assert self.model is not None  # Lightning has connected it
        broadcast_(parameter for parameter in self.model.parameters() if parameter.requires_grad)


def launched() -> bool:
    """Whether this process is one of several that `in_processes`, torchrun or Slurm has started."""
    return "LOCAL_RANK" in os.environ or SLURMEnvironment.detect()


def in_processes(
    count: int, function: Callable[[Any], Any], argument: Any, mendable: tuple[type[Exception], ...]
) -> None:
    """`function(argument)` in `count` fresh processes on this machine, which Lightning takes for ranks.

    Raises `RankError` when one ends before its time; the others are ended then. What of the errors is `mendable` is
    told in its own words. A signal goes on to the ranks, which end in their own time; then raises `Interrupted`.
    """
    said = mp.get_context("spawn").SimpleQueue()
    port = find_free_network_port()
    context = mp.start_processes(_as_rank, (port, function, argument, mendable, said), count, join=False)
    try:
        with _passing_on(context.processes):
            while not context.join(grace_period=GRACE):
                pass
    except ProcessException as error:
        told = None if said.empty() else said.get()
        if isinstance(told, str):
            raise RankError(told) from None
        if told is not None:
            raise Interrupted(*told) from None
        if isinstance(error, ProcessRaisedException):  # a bug: its traceback is worth more than a sentence
            raise
        raise RankError(f"{error.msg}, one of {count} ranks, and the others were ended with it") from None


@contextmanager
def _passing_on(processes: list[Any]) -> Iterator[None]:
    """SIGTERM and SIGINT go to the ranks for the length of the block, where signals can be taken: the main thread."""
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
    mendable: tuple[type[Exception], ...],
    said: Any,
) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        function(argument)
    except mendable as error:
        said.put(" ".join(str(error).split()))
        raise SystemExit(MENDED) from None
    except Interrupted as interrupted:
        said.put((interrupted.signum, interrupted.kept))
        raise SystemExit(128 + interrupted.signum) from None
