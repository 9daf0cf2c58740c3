"""Whole runs of two ranks, from the command line, beside the same run of one process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from src.checkpointing.checkpoint import checkpoints
from src.loggers.csv import read_table
from src.models.roles import build_roles
from tests.rollout_servers import RolloutServer, serving_rollouts
from tests.tiny import model_settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# float64: Adam makes a step of any size out of a gradient that is 0 but for rounding; logged numbers stay float32
TINY = "experiment=quick trainer.accelerator=cpu model.dtype=float64 logger=csv".split()
PPO = "reward=length gold_reward=vader ppo.drop_failed=true".split()
SHORT = ["sft.steps=12", "sft.eval_rows=30", "reward_model.steps=8", "ppo.num_iterations=3"]
SHORT += ["reward_model.normalization_samples=16"]
close = {"rtol": 1e-6, "atol": 1e-6}


def start(*overrides: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "src.train", *overrides], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def train(*overrides: str, cwd: Path = ROOT) -> tuple[int, str, str]:
    process = start(*overrides, cwd=cwd)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def run(folder: Path, stage: str, *overrides: str) -> Path:
    """The folder of a finished run."""
    short = [o for o in SHORT if o.startswith({"sft": "sft.", "reward": "reward_model.", "ppo": "ppo."}[stage])]
    code, out, err = train(f"stage={stage}", *TINY, *short, *overrides, "name=x", f"log_dir={folder}")
    assert code == 0, err
    assert out.count("result.json") == 1  # the report is said once
    return folder / stage / "x"


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SFT stage in one process."""
    return run(tmp_path_factory.mktemp("one"), "sft")


def samples(path: Path) -> list[tuple[Any, dict[str, list[float]]]]:
    """Of each sample what must be equal, and the numbers of its tokens, which are rounded."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokens = [row.pop("tokens") for row in rows]
    return [((row, numbers.pop("text")), numbers) for row, numbers in zip(rows, tokens, strict=True)]


def assert_same_run(one: Path, two: Path, weights: str, tolerance: float = 1e-7) -> None:
    """Tables, figures, files and weights of both."""
    alone, both = (read_table(folder / "metrics.csv") for folder in (one, two))
    assert alone
    assert_close(both, alone, **close)
    figures = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    for result in figures:
        for name in ("seconds", "config_hash", "git_revision"):
            result.pop(name)
    assert same(figures[1], figures[0])
    assert {path.relative_to(one) for path in one.rglob("*")} == {path.relative_to(two) for path in two.rglob("*")}
    for path in (one / "samples").glob("*"):
        pairs = zip(*(samples(folder / "samples" / path.name) for folder in (one, two)), strict=True)
        for (texts, numbers), (same_texts, near) in pairs:
            assert texts == same_texts
            assert numbers.keys() == near.keys()
            for name in numbers:
                assert numbers[name] == pytest.approx(near[name], rel=1e-3, abs=1e-4), name
    assert_close(load_file(two / weights), load_file(one / weights), rtol=tolerance, atol=tolerance)


def same(a: Any, b: Any) -> bool:
    """Equal to six digits, all the way down."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6) if isinstance(a, float) else a == b


def test_sft_by_two_ranks(sft: Path, tmp_path: Path) -> None:
    """Checklist 48."""
    assert_same_run(sft, run(tmp_path, "sft", "trainer=ddp"), "model/model.safetensors")


def test_reward_stage_by_two_ranks(sft: Path, tmp_path: Path) -> None:
    """Checklist 48. With gain and bias set on the SFT policy's samples.

    The reward model is float32 and has biases of keys, whose gradient is 0: there Adam's steps follow the rounding. Its
    bias is a mean over the small spread of scores that have hardly been trained, which enlarges it.
    """
    path = f"model.path={sft / 'model'}"
    folders = run(tmp_path / "one", "reward", path), run(tmp_path / "two", "reward", path, "trainer=ddp")
    assert_same_run(*folders, "model/model.safetensors", tolerance=2e-3)


def test_ppo_by_two_ranks(sft: Path, tmp_path: Path) -> None:
    """Checklist 40, 48. Rollouts, scores, baselines, gradients, evaluation: one run, whoever did the work."""
    given = [
        *PPO,
        f"model.path={sft / 'model'}",
        "ppo.ptx_coef=0.1",
        "score_scaling=normalize",
        "kl_controller=adaptive",
    ]
    folders = run(tmp_path / "one", "ppo", *given), run(tmp_path / "two", "ppo", *given, "trainer=ddp")
    assert_same_run(*folders, "adapter/adapter_model.safetensors")


def test_two_ranks_ask_the_same_servers(sft: Path, tmp_path: Path) -> None:
    """One rank gives the weights, each asks for its rows, and the samples are those of one process."""
    model = str(sft / "model")
    server = RolloutServer(build_roles(model_settings(model, dtype="float64", lora=None), seed=0), context=500)
    given = [*PPO, f"model.path={model}", "engine=vllm_server", f"rollout.engine.urls=[{server.url}]"]
    with serving_rollouts(server):
        one = run(tmp_path / "one", "ppo", *given)
        alone = sorted(server.prompts)
        server.prompts.clear()
        two = run(tmp_path / "two", "ppo", *given, "trainer=ddp")
    assert len(alone) == 3 * 16
    assert sorted(server.prompts) == alone
    assert len(server.given) == 6
    assert_same_run(one, two, "adapter/adapter_model.safetensors")


def test_a_rank_that_is_killed_ends_the_run_which_can_be_gone_on_with(sft: Path, tmp_path: Path) -> None:
    """The other rank waits for nobody: one sentence, exit code 2, within a minute; the same command goes on."""
    given = [*TINY, *PPO, f"model.path={sft / 'model'}", "trainer=ddp", "callbacks.checkpoint.every=1"]
    command = [*given, "ppo.num_iterations=6", "name=killed", f"log_dir={tmp_path}"]
    process, folder = start(*command), tmp_path / "ppo/killed"
    while not checkpoints(folder / "checkpoints"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    ranks = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    killed = time.monotonic()
    ranks[1].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: process 1 terminated with signal SIGKILL")
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert not (folder / "result.json").exists()
    code, _, err = train(*command)
    assert code == 0, err
    assert sorted(read_table(folder / "metrics.csv")) == [1, 2, 3, 4, 5, 6]


def test_a_reward_that_fails_on_one_rank_is_said_once(sft: Path, tmp_path: Path) -> None:
    """And the other rank does not wait for the failed one."""
    (tmp_path / "faulty.py").write_text(
        "import os\ndef judge(prompts, responses, metadata):\n"
        "    return [float('nan') if os.environ['LOCAL_RANK'] == '1' else 1.0 for _ in responses]\n"
    )
    given = [*TINY, "reward=function", "reward.target=faulty.judge", "gold_reward=none", "early_stop=none"]
    started = time.monotonic()
    code, _, err = train(
        *given, f"model.path={sft / 'model'}", "trainer=ddp", f"log_dir={tmp_path}", cwd=tmp_path
    )  # fmt: skip
    assert code == 2
    assert time.monotonic() - started < 120
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: reward faulty.judge gave nan for prompt ")
    assert "Traceback" not in err
