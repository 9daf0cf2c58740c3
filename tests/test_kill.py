"""Killed anywhere and gone on with by the same command: every file that a run leaves is that of a run nobody killed.

`python -m benchmarks.kills` does the same with every phase and more random moments.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.kills import (
    EDGES,
    GROUPS,
    MINIBATCH,
    PPO,
    RENAME,
    REWARD,
    ROLLOUT,
    SCORING,
    SEAL,
    SFT,
    TIDY,
    Fault,
    Runner,
    differences,
    faults_of_supervised,
    unequal,
)  # fmt: skip


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("kills"))


def assert_equal_after(runner: Runner, overrides: tuple[str, ...], name: str, *moments: Fault | float) -> None:
    whole = runner.folder(f"whole-{hash(overrides)}", overrides)
    if not whole.exists():
        runner.whole(whole.name, overrides)
    assert differences(whole, runner.killed(name, overrides, *moments)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Fault("scoring", SCORING, 8),
        Fault("between minibatches", MINIBATCH, 11),
        Fault("inside a checkpoint, flushed and not renamed", RENAME, 2),
        Fault("before result.json", "src.runs.start:make_result"),
    ],
    ids=lambda fault: fault.phase,
)
def test_ppo_killed_in_a_phase_equals_the_run_that_was_not(runner: Runner, fault: Fault) -> None:
    """Checklist 61. Weights, optimizers, tables, samples and result, bit for bit."""
    assert_equal_after(runner, PPO, fault.phase.replace(" ", "-").replace(",", ""), fault)


@pytest.mark.slow
def test_ppo_killed_again_and_again_equals_the_run_that_was_not(runner: Runner) -> None:
    """Checklist 61. In turn: a torn write, a file that the disk has lost half of, and a moment by the clock."""
    moments = [
        Fault("inside a checkpoint, half written", SEAL, 1, spoils="writing.tmp"),
        Fault("after a checkpoint, its file torn", TIDY, 2, spoils="iteration-*.ckpt"),
        random.Random(23).uniform(0.2, 1.0),  # seconds
    ]
    assert_equal_after(runner, PPO, "thrice", *moments)


@pytest.mark.slow
def test_a_group_run_killed_in_its_rollout_equals_the_run_that_was_not(runner: Runner) -> None:
    """Checklist 61. Two samples of each prompt, no critic."""
    assert_equal_after(runner, GROUPS, "groups", Fault("rollout", ROLLOUT, 5))


@pytest.mark.slow
def test_ppo_resumed_where_a_pass_over_the_prompts_ends_goes_on(runner: Runner) -> None:
    """Checklist 62, 61. The checkpoint of iteration 2 holds exactly one pass; the next begins in a fresh order."""
    assert_equal_after(runner, EDGES, "edges", Fault("rollout", ROLLOUT, 3))


@pytest.mark.slow
@pytest.mark.parametrize("fault", faults_of_supervised(random.Random(21), "src.modules.sft:SFTModule.save", 15),
                         ids=lambda fault: fault.phase)  # fmt: skip
def test_sft_killed_equals_the_run_that_was_not(runner: Runner, fault: Fault) -> None:
    """Checklist 61, 62. Every checkpoint lies where a pass over the texts ends."""
    assert_equal_after(runner, SFT, fault.phase.replace(" ", "-").replace(",", ""), fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", faults_of_supervised(random.Random(22), "src.modules.reward:RewardModule.save", 12),
                         ids=lambda fault: fault.phase)  # fmt: skip
def test_a_reward_model_killed_equals_the_one_that_was_not(runner: Runner, fault: Fault) -> None:
    """Checklist 61, 62. Its head is normalized once, whenever the kill came."""
    assert_equal_after(runner, REWARD, fault.phase.replace(" ", "-").replace(",", ""), fault)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kept"),
    [
        (Fault("rollout", ROLLOUT, 3, signum=signal.SIGTERM), "iteration-3.ckpt is kept"),
        (Fault("scoring", SCORING, 5, signum=signal.SIGTERM), "iteration-3.ckpt is kept"),  # two judges
        (Fault("learning", MINIBATCH, 10, signum=signal.SIGTERM), "iteration-3.ckpt is kept"),
        (Fault("checkpoint", RENAME, 1, signum=signal.SIGTERM), "iteration-2.ckpt is kept"),
        (Fault("learning", MINIBATCH, 10, signum=signal.SIGINT), "iteration-3.ckpt is kept"),
        (Fault("test", "lightning.pytorch:Trainer.test", signum=signal.SIGTERM), "iteration-6.ckpt is kept"),
    ],
    ids=lambda value: value.phase if isinstance(value, Fault) else "",
)
def test_a_signal_saves_and_says_so_and_the_same_command_goes_on(runner: Runner, fault: Fault, kept: str) -> None:
    """Checklist 61. Exit code 128 + signal; an extra checkpoint changes nothing of what follows."""
    whole, name = runner.folder(f"whole-{hash(PPO)}", PPO), f"{fault.phase}-{fault.signum}"
    if not whole.exists():
        runner.whole(whole.name, PPO)
    assert runner.run((*PPO, f"name={name}"), fault) == 128 + fault.signum, runner.said()
    last_line = runner.said().splitlines()[-1]
    assert kept in last_line
    assert "the same command resumes" in last_line
    assert "Traceback" not in runner.said()
    assert runner.run((*PPO, f"name={name}")) == 0, runner.said()
    assert differences(whole, runner.folder(name, PPO)) == []


def test_the_comparison_notices_a_bit(tmp_path: Path) -> None:
    import torch

    one = {"a": [torch.tensor([0.0, 1.0])], "b": {"c": 1}}
    assert list(unequal(one, {"a": [torch.tensor([0.0, 1.0])], "b": {"c": 1}})) == []
    assert list(unequal(one, {"a": [torch.tensor([-0.0, 1.0])], "b": {"c": 1}})) == [".a[0]: tensors"]
    assert list(unequal(one, {"a": one["a"], "b": {"c": 1.0}})) == [".b.c: int and float"]
    for name in ("whole", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step,x\n1,2\n")
    assert differences(tmp_path / "whole", tmp_path / "other") == []
    (tmp_path / "other/metrics.csv").write_text("step,x\n1,3\n")
    (tmp_path / "other/more").touch()
    assert differences(tmp_path / "whole", tmp_path / "other") == ["metrics.csv differs", "more is there in addition"]
