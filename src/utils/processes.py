"""Starting the processes of a run that has several, and the strategy by which Lightning lets them train together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import ProcessRaisedException
from torch.multiprocessing.spawn import ProcessException

from src.utils.ranks import agree

GRACE = 10.0  # seconds that the others have to end by themselves when a rank has failed, and again after SIGTERM
MENDED, INTERRUPTED = 2, 130  # exit codes of a rank: it said what is wrong; Ctrl-C


class RankError(RuntimeError):
    """A rank failed, and the run with it; says in one sentence why."""


class SummedGradients(DDPStrategy):
    """Lightning's DDP without its wrapper: the modules sum their gradients themselves, once per optimizer step.

    The wrapper averages over ranks, in every backward pass, and wants to know beforehand which parameters take part.
    Here a rank's loss is its part of one sum, a step has many backward passes, and roles take turns.
    """

    def configure_ddp(self) -> None:
        """Start all ranks from the weights of rank 0."""
        assert self.model is not None  # Lightning has connected it
        agree(parameter for parameter in self.model.parameters() if parameter.requires_grad)


def launched() -> bool:
    """Whether this process is one of several that `in_processes`, torchrun or Slurm has started."""
    return "LOCAL_RANK" in os.environ or SLURMEnvironment.detect()


def in_processes(
    count: int, function: Callable[[Any], Any], argument: Any, mendable: tuple[type[Exception], ...]
) -> None:
    """`function(argument)` in `count` fresh processes on this machine, which Lightning takes for ranks.

    Raises `RankError` when one ends before its time; the others are ended then. What of the errors is `mendable` is
    told in its own words. Ctrl-C waits until every rank has put its things in order.
    """
    said = mp.get_context("spawn").SimpleQueue()
    port = find_free_network_port()
    context = mp.start_processes(_as_rank, (port, function, argument, mendable, said), count, join=False)
    try:
        while not context.join(grace_period=GRACE):
            pass
    except KeyboardInterrupt:
        for process in context.processes:
            process.join(GRACE)
            process.terminate()
        raise KeyboardInterrupt("the ranks have said what is kept") from None
    except ProcessException as error:
        if not said.empty():
            raise RankError(said.get()) from None
        code = context.processes[error.error_index].exitcode
        if code == INTERRUPTED:
            raise KeyboardInterrupt("the rank has said what is kept") from None
        if isinstance(error, ProcessRaisedException):  # a bug: its traceback is worth more than a sentence
            raise
        raise RankError(f"{error.msg}, one of {count} ranks, and the others were ended with it") from None


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
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
