"""Kills before and after the training itself: what is left equals what an uninterrupted command leaves.

Start-up, stored models in the making, the last comparison, export, the first second of a resumed run, one of two ranks,
and a run that wandb records offline.
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.kills import MINIBATCH, PPO, RENAME, ROLLOUT, STEP, TINY, Fault, Runner, differences

pytestmark = pytest.mark.slow
START = (
    Fault("before the settings are checked", "src.runs.start:stage_of"),
    Fault("before the first file is written", "omegaconf:OmegaConf.save"),
    Fault("before the models are loaded", "src.stages.ppo:build_roles"),
    Fault("before the first step", "lightning.pytorch:Trainer.fit"),
)
STORED = (
    Fault("in the first steps of SFT", STEP, 3),
    Fault("SFT model, in its first checkpoint", RENAME, 1),
    Fault("SFT model, before it is saved", "src.modules.sft:SFTModule.save"),
    Fault("SFT model, before its checksums", "src.runs.start:seal_models"),
    Fault("between the stored models", "src.stages.reward:RewardStage.build"),
    Fault("reward model, before its scores are normalized", "src.callbacks.normalize:NormalizeScores._sft_samples"),
    Fault("reward model, before its result", "src.runs.start:make_result", 2),
)
END = (
    Fault("in the comparison", "src.rollout.evaluation:Evaluator.answers", 2),
    Fault("before the comparison is written", "src.callbacks.samples:ComparisonTable.on_test_end"),
    Fault("before the checksums", "src.runs.start:seal_models"),
)
RESUMED = (
    Fault("while its checkpoint is read", "torch:load"),
    Fault("while its tables are restored", "src.loggers.csv:CsvTables.load_state_dict"),
    Fault("in its first rollout", ROLLOUT),
)
EXPORT = (
    Fault("before the model card", "src.export.__main__:model_card"),
    Fault("before it is compared", "src.export.__main__:compare"),
)
RANKS = (*PPO, "trainer=ddp", "trainer.devices=2")


def phases(*faults: Fault) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults, ids=lambda fault: fault.phase)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    made = Runner(tmp_path_factory.mktemp("kills"))
    made.whole("whole", PPO)
    return made


@pytest.fixture(scope="module")
def from_nothing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A place for logs, which their files name, and what an uninterrupted run has left there, moved away."""
    folder = tmp_path_factory.mktemp("nothing")
    logs, whole = folder / "logs", folder / "whole"
    logs.mkdir()
    Runner(logs).whole("run", PPO)
    logs.rename(whole)
    return logs, whole


def same_after(runner: Runner, name: str, *moments: Fault) -> bool:
    return differences(runner.folder("whole", PPO), runner.killed(name, PPO, *moments)) == []


@phases(*START, *END)
def test_a_run_killed_at_its_start_or_end(runner: Runner, fault: Fault) -> None:
    assert same_after(runner, fault.phase.replace(" ", "-"), fault)


@phases(*RESUMED)
def test_a_resumed_run_killed_in_its_first_second(runner: Runner, fault: Fault) -> None:
    assert same_after(runner, fault.phase.replace(" ", "-"), Fault("between minibatches", MINIBATCH, 11), fault)


@phases(*STORED)
def test_a_run_killed_while_the_models_it_needs_are_made(from_nothing: tuple[Path, Path], fault: Fault) -> None:
    """The stored models are the same too, and nothing half made is left."""
    logs, whole = from_nothing
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    Runner(logs).killed("run", PPO, fault)
    stored = sorted(path.relative_to(whole) for path in whole.glob("artifacts/*") if path.is_dir())
    assert [path.name.partition("-")[0] for path in stored] == ["reward", "sft"]
    assert sorted(path.relative_to(logs) for path in logs.glob("artifacts/*") if path.is_dir()) == stored
    for folder in (Path("ppo/run"), *stored):
        assert differences(whole / folder, logs / folder) == []


@phases(*EXPORT)
def test_a_killed_export_leaves_nothing_in_its_place(runner: Runner, fault: Fault, tmp_path: Path) -> None:
    run = str(runner.folder("whole", PPO))
    whole, other = (f"out={tmp_path / name}" for name in ("whole", "killed"))
    assert runner.command("src.export.__main__", (run, whole)) == 0, runner.said()
    assert runner.command("src.export.__main__", (run, other), fault) == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert runner.command("src.export.__main__", (run, other)) == 0, runner.said()
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_of_two_ranks_of_which_one_is_killed(runner: Runner, victim: int) -> None:
    """The other ends too, with an error; the same command goes on."""
    whole = runner.folder("ranks", RANKS)
    if not whole.exists():
        runner.whole("ranks", RANKS)
    name = f"ranks-without-{victim}"
    process = runner.start("src.train", (*TINY, f"log_dir={runner.log_dir}", *RANKS, f"name={name}"))
    folder = runner.folder(name, RANKS)
    while not list(folder.glob("checkpoints/iteration-*.ckpt")):
        assert process.is_alive(), runner.said()
        time.sleep(0.02)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    ranks[victim].kill()
    process.join()
    assert process.exitcode not in (0, None)
    assert "ranks" in runner.said()
    assert not (folder / "result.json").exists()
    assert runner.run((*RANKS, f"name={name}")) == 0, runner.said()
    assert differences(whole, folder) == []


def test_a_run_recorded_by_wandb_offline(runner: Runner) -> None:
    """Its tables and weights; wandb's own files hold both parts."""
    recorded = (*PPO, "logger=wandb")
    folder = runner.killed("recorded", recorded, Fault("between minibatches", MINIBATCH, 11))
    (other,) = differences(runner.folder("whole", PPO), folder)
    assert other.startswith("result.json: .config_hash")  # the logger is a setting
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
