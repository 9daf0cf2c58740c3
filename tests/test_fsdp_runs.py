"""Whole runs of sharded ranks from the command line, and runs that go on with another number of processes."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from src.checkpointing.checkpoint import checkpoints
from tests.test_ddp_runs import PPO, TINY, assert_same_run, run, start, train

pytestmark = pytest.mark.slow
FULL = "model.lora=null"
BEST = ("ppo.held_out.every=1", "ppo.held_out.best=score")
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SFT stage in one process."""
    return run(tmp_path_factory.mktemp("one"), "sft")


def test_sft_by_shards(sft: Path, tmp_path: Path) -> None:
    """Checklist 48. Every weight is trained, saved as a plain model, and measured."""
    assert_same_run(sft, run(tmp_path, "sft", "trainer=fsdp"), "model/model.safetensors")


def test_reward_stage_by_shards(sft: Path, tmp_path: Path) -> None:
    """Checklist 48. With gain and bias, which are set while the score head is sharded. Tolerances as under DDP."""
    path = f"model.path={sft / 'model'}"
    folders = run(tmp_path / "one", "reward", path), run(tmp_path / "two", "reward", path, "trainer=fsdp")
    assert_same_run(*folders, "model/model.safetensors", tolerance=2e-3)


@pytest.mark.parametrize("given", [
    [*BEST, "rollout.lag=1", "correction=truncate"], [FULL],
], ids=["lora", "full"])  # fmt: skip
def test_ppo_by_shards(sft: Path, tmp_path: Path, given: list[str]) -> None:
    """Checklist 40, 48. Rollouts on gathered layers, one step behind too; scores, updates, held-out answers, export."""
    given = [*PPO, f"model.path={sft / 'model'}", "ppo.ptx_coef=0.1", *given]
    folders = run(tmp_path / "one", "ppo", *given), run(tmp_path / "two", "ppo", *given, "trainer=fsdp")
    assert_same_run(*folders, "model/model.safetensors")


@pytest.mark.parametrize(("trainer", "given", "weights"), [
    ("ddp", [], ADAPTER), ("fsdp", [], ADAPTER), ("fsdp", [FULL, *BEST], "model/model.safetensors"),
], ids=["ddp", "fsdp", "fsdp-full-best"])  # fmt: skip
def test_a_run_killed_at_two_ranks_goes_on_at_one_and_at_four(
    sft: Path, tmp_path: Path, trainer: str, given: list[str], weights: str
) -> None:
    """Checklist 48, 61. The same batches, so the same result up to rounding as of a run that nobody killed."""
    given = [*PPO, f"model.path={sft / 'model'}", "callbacks.checkpoint.every=1", "kl_controller=adaptive", *given]
    whole = run(tmp_path / "whole", "ppo", *given)
    command = [*TINY, *given, "ppo.num_iterations=3", "name=x"]
    process = start(*command, f"trainer={trainer}", "trainer.devices=2", f"log_dir={tmp_path / 'killed'}")
    folder = tmp_path / "killed/ppo/x"
    while not checkpoints(folder / "checkpoints"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    ranks[1].send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert not (folder / "result.json").exists()
    for name, other in {"one": "trainer=default", "four": f"trainer={trainer} trainer.devices=4"}.items():
        shutil.copytree(tmp_path / "killed", tmp_path / name, symlinks=True)
        code, out, err = train(*command, *other.split(), f"log_dir={tmp_path / name}")
        assert code == 0, err
        assert "resuming from" in out
        assert_same_run(whole, tmp_path / name / "ppo/x", weights)
