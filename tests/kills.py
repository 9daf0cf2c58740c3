"""Runs that are killed at a chosen or a random moment, and the comparison with a run that was not.

Each run is a process of its own with the command line of `python -m src.train`, forked from a server that has done the
imports. A fault is armed in that process alone: the n-th call of a named function ends it with a signal.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from src.callbacks import run_page
from src.runs import start

ROOT = Path(__file__).parents[1]
STAGES = [f"src.stages.{stage}" for stage in ("sft", "reward", "ppo")]  # `src.train` imports one when it runs
TINY = ("experiment=quick", "trainer.accelerator=cpu", "data.n_reviews=300", "data.n_pairs=40")
PPO = (
    *("stage=ppo", "ppo.num_iterations=6", "ppo.batch_size=8", "ppo.minibatch_size=4", "ppo.micro_batch_size=4"),
    *("ppo.eval_prompts=8", "callbacks.checkpoint.every=2", "ppo.samples.every=2"),
    *("kl_controller=adaptive", "score_scaling=normalize"),
)
GROUPS = (*PPO, "advantage=rloo", "rollout.samples_per_prompt=2")
# 250 prompts: the passes over them end exactly at the checkpoints of iterations 2 and 4
EDGES = (*PPO, "ppo.batch_size=125", "ppo.minibatch_size=125", "ppo.micro_batch_size=125", "ppo.epochs=1",
         "rollout.max_new_tokens=6")  # fmt: skip
# 250 texts, 40 pairs: so do the passes of these
SFT = ("stage=sft", "sft.steps=15", "sft.batch_size=50", "sft.eval_rows=20", "callbacks.checkpoint.every=5",
       "sft.log_every=2")  # fmt: skip
REWARD = ("stage=reward", "reward_model.steps=12", "reward_model.batch_size=10", "callbacks.checkpoint.every=4",
          "reward_model.log_every=3", "reward_model.normalization_samples=16")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A signal at the `call`-th call of `target` ("module:name" or "module:Class.method"); what came before is done."""

    phase: str
    target: str
    call: int = 1
    spoils: str | None = None  # cut this file of the run folder's checkpoints in half first: a torn write
    signum: int = signal.SIGKILL

    def arm(self) -> None:
        """Put the fault in place, in this process."""
        module, _, path = self.target.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original, calls = getattr(owner, name), iter(range(1, sys.maxsize))

        def dying(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.call:
                self._spoil(args)
                os.kill(os.getpid(), self.signum)
            return original(*args, **kwargs)

        setattr(owner, name, dying)

    def _spoil(self, args: tuple[Any, ...]) -> None:
        if self.spoils is None:
            return
        folder = next(arg.folder if hasattr(arg, "folder") else arg.parent for arg in args if arg is not None)
        victim = max(folder.glob(self.spoils), key=lambda path: path.stat().st_mtime)
        os.truncate(victim, victim.stat().st_size // 2)


ROLLOUT = "src.rollout.sampling:Sampler.sample"
SCORING = "src.rollout.scoring:Scorer.score"
MINIBATCH = "src.modules.ppo:PPOModule._learn_minibatch"
OPTIMIZERS = "src.modules.ppo:PPOModule._learn_values"
WRITE = "lightning.pytorch:Trainer.save_checkpoint"
SEAL = "src.checkpointing.checkpoint:seal"
RENAME = "src.checkpointing.checksum:rename"
TIDY = "src.checkpointing.checkpoint:IterationCheckpoint._tidy"
ROW = "src.loggers.csv:CsvTables.log_metrics"
STEP = "torch.optim:AdamW.step"
VALIDATION = "lightning.pytorch.loops.evaluation_loop:_EvaluationLoop.run"


def faults_of_ppo(draw: random.Random) -> list[Fault]:
    """One fault of each phase of 6 iterations with 2 x 2 minibatches and a checkpoint every second one."""
    return [
        Fault("rollout", ROLLOUT, draw.randint(1, 6)),
        Fault("scoring", SCORING, draw.randint(2, 12)),
        Fault("between minibatches", MINIBATCH, draw.randint(2, 24)),
        Fault("between the steps of policy and critic", OPTIMIZERS, draw.randint(2, 24)),
        Fault("before a checkpoint", WRITE, draw.randint(1, 3)),
        Fault("inside a checkpoint, half written", SEAL, draw.randint(1, 3), spoils="writing.tmp"),
        Fault("inside a checkpoint, flushed and not renamed", RENAME, draw.randint(1, 3)),
        Fault("after a checkpoint, its file torn", TIDY, draw.randint(2, 3), spoils="iteration-*.ckpt"),
        Fault("between a checkpoint and its row", ROW, 2 * 2 * draw.randint(1, 2) + 1),
        Fault("before the model is saved", "src.modules.ppo:PPOModule.save"),
        Fault("between model and test", "lightning.pytorch:Trainer.test"),
        Fault("before result.json", "src.runs.start:make_result"),
    ]


def faults_of_supervised(draw: random.Random, module: str, steps: int) -> list[Fault]:
    """The same for a stage with one optimizer and a validation at its end."""
    return [
        Fault("between steps", STEP, draw.randint(2, steps)),
        Fault("inside a checkpoint, half written", SEAL, draw.randint(1, 2), spoils="writing.tmp"),
        Fault("before the validation", VALIDATION),
        Fault("after the last checkpoint, its file torn", TIDY, 3, spoils="iteration-*.ckpt"),
        Fault("before the model is saved", module),
    ]


@dataclass
class Runner:
    """Starts runs below one `log_dir` and remembers how long a whole one takes."""

    log_dir: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline")  # read by what the server imports
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(["tests.kills", "src.train", "src.runs.start", *STAGES])

    def run(self, overrides: tuple[str, ...], fault: Fault | None = None, *, kill_after: float | None = None) -> int:
        """The exit code; -9 when it was killed, by the fault or `kill_after` seconds after its start."""
        return self.command("src.train", (*TINY, f"log_dir={self.log_dir}", *overrides), fault, kill_after)

    def command(
        self, module: str, arguments: tuple[str, ...], fault: Fault | None = None, kill_after: float | None = None
    ) -> int:
        """The same for `python -m MODULE ARGUMENTS`."""
        process = self.start(module, arguments, fault)
        process.join(kill_after)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        return process.exitcode

    def start(self, module: str, arguments: tuple[str, ...], fault: Fault | None = None) -> Any:
        """The process, which runs."""
        process = self.server.Process(target=child, args=(module, arguments, fault, str(self.log_dir / "output.txt")))
        process.start()
        return process

    def whole(self, name: str, overrides: tuple[str, ...]) -> Path:
        """The folder of a run that nobody kills."""
        started = time.perf_counter()
        assert self.run((*overrides, f"name={name}")) == 0, self.said()
        self.seconds[name] = time.perf_counter() - started
        return self.folder(name, overrides)

    def folder(self, name: str, overrides: tuple[str, ...]) -> Path:
        """Where a run of that name lies."""
        stage = next(text.removeprefix("stage=") for text in overrides if text.startswith("stage="))
        return self.log_dir / stage / name

    def said(self) -> str:
        """What the last run wrote."""
        return (self.log_dir / "output.txt").read_text(encoding="utf-8")

    def killed(self, name: str, overrides: tuple[str, ...], *moments: Fault | float) -> Path:
        """The folder of a run that was killed at each moment in turn, and gone on with each time."""
        for moment in moments:
            by_clock = isinstance(moment, float)
            code = self.run(
                (*overrides, f"name={name}"), None if by_clock else moment, kill_after=moment if by_clock else None
            )
            assert code == -signal.SIGKILL, f"{moment} ended with {code}: {self.said()}"
        folder = self.folder(name, overrides)
        assert not (folder / "result.json").exists()
        assert self.run((*overrides, f"name={name}")) == 0, self.said()
        return folder


def child(module: str, arguments: tuple[str, ...], fault: Fault | None, output: str) -> None:
    """`python -m MODULE ARGUMENTS`, with a fault, its words in a file; without the page, a quarter of a short run."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    main = importlib.import_module(module).main
    for writer in (start, run_page):  # nothing reads the page, and `differences` does not compare it
        writer.write_page = lambda folder: None
    if fault is not None:
        fault.arm()
    main()


# ----------------------------------------------------------------------------------------------------- the comparison


def differences(whole: Path, other: Path) -> list[str]:
    """What differs between two finished run folders, but for clocks, commits, names, places and what wandb keeps."""
    found = []
    for path in sorted(whole.rglob("*")):
        relative = path.relative_to(whole)
        mine, theirs = path, other / relative
        if path.is_dir() or relative.name in ("config.yaml", "timing.csv") or path.suffix in (".png", ".html"):
            continue
        if relative.parts[0] == "wandb":
            continue
        if not theirs.is_file():
            found.append(f"{relative} is missing")
        elif path.suffix == ".ckpt":
            found += [f"{relative}: {what}" for what in unequal(read_checkpoint(mine), read_checkpoint(theirs))]
        elif relative.name == "result.json":
            one, two = (
                json.loads(p.read_text(encoding="utf-8")) | {"seconds": 0, "git_revision": ""} for p in (mine, theirs)
            )
            found += [f"{relative}: {what}" for what in unequal(one, two)]
        elif mine.read_bytes() != theirs.read_bytes():
            found.append(f"{relative} differs")
    more = {p.relative_to(other) for p in other.rglob("*") if p.is_file()}
    more -= {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}
    return found + [
        f"{path} is there in addition"
        for path in sorted(more)
        if path.suffix != ".damaged" and path.parts[0] != "wandb"
    ]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All of a checkpoint but seconds, the commit, and the configuration, in which the run's name is."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["tables"]["timing"], checkpoint["run"]["config"], checkpoint["run"]["git_revision"]
    return checkpoint


def unequal(one: Any, two: Any, place: str = "") -> Iterator[str]:
    """The places at which two nested structures differ, to the bit."""
    if type(one) is not type(two):
        yield f"{place}: {type(one).__name__} and {type(two).__name__}"
    elif isinstance(one, dict):
        if list(one) != list(two):
            yield f"{place}: keys {list(one)} and {list(two)}"
        for key in [key for key in one if key in two]:
            yield from unequal(one[key], two[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        if len(one) != len(two):
            yield f"{place}: {len(one)} and {len(two)} elements"
        for number, pair in enumerate(zip(one, two, strict=False)):
            yield from unequal(*pair, f"{place}[{number}]")
    elif not same_leaf(one, two):
        yield f"{place}: tensors" if isinstance(one, torch.Tensor) else f"{place}: {one} and {two}"


def same_leaf(one: Any, two: Any) -> bool:
    """Whether two plain values or tensors have the same bits; a NaN equals itself."""
    if isinstance(one, torch.Tensor):
        bits = [x.contiguous().view(-1).view(torch.uint8) for x in (one, two)]
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*bits)
    return repr(one) == repr(two)
