"""Two processes that have met by gloo and wait for something to do, so that many tests share one start."""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
PATIENCE = 120.0  # seconds after which a rank counts as hanging


class Ranks:
    """`ranks(function, *arguments)` runs a function of a module in both processes at once; returns what each says."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(WORLD)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(rank, folder / "meet", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(PATIENCE), f"rank {rank} hangs in {function.__name__}"
            answers.append(pipe.recv())
        for rank, (fine, said) in enumerate(answers):
            assert fine, f"rank {rank}: {said}"
        return [torch.load(io.BytesIO(said), weights_only=False) for _, said in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, meeting: Path, pipe: Connection) -> None:
    """Meet the others, then do what comes through the pipe."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    while True:
        function, arguments = pipe.recv()
        try:
            said = io.BytesIO()
            torch.save(function(*arguments), said)
            pipe.send((True, said.getvalue()))
        except Exception:
            pipe.send((False, traceback.format_exc()))
