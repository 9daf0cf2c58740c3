"""`model.fast_cpu`: off, nothing of `src/kernels` is entered; on, all of it, with the same numbers up to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from cProfile import Profile
from pathlib import Path
from typing import Any

import pytest

import src.kernels
from src.loggers.csv import read_table
from src.runs.start import start
from tests.tiny import FOREIGN_WARNINGS, write_lm, write_reward_model

pytestmark = [pytest.mark.slow, *FOREIGN_WARNINGS]

KERNELS = Path(src.kernels.__file__).parent
FILES = {path.stem for path in KERNELS.glob("*.py")} - {"__init__"}
# layers large enough for the faster product, and rows with padding enough to be worth leaving out
WIDE = {"n_embd": 384, "n_head": 6}
SMALL = [
    *("experiment=quick", "model=gpt2", "trainer.accelerator=cpu", "ppo.num_iterations=2"),
    *("ppo.batch_size=8", "ppo.minibatch_size=4", "ppo.micro_batch_size=4", "ppo.epochs=1", "ppo.lr=1.0e-3"),
    *("ppo.eval_prompts=4", "rollout.max_prompt_tokens=12", "rollout.max_new_tokens=20", "ppo.ptx_coef=0.1"),
    "name=run",
]


@contextmanager
def watched() -> Iterator[set[str]]:
    """The files of `src/kernels` of which a function is called, in this thread or in one that is started."""
    profiles: list[Profile] = []
    entered: set[str] = set()

    def watch(*_: Any) -> None:
        profiles.append(Profile(subcalls=False, builtins=False))
        profiles[-1].enable()  # of this thread; from Python 3.12 on of every thread

    if sys.version_info < (3, 12):
        threading.setprofile(watch)
    watch()
    try:
        yield entered
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        profiles[0].disable()
        called = {Path(entry.code.co_filename) for profile in profiles for entry in profile.getstats()}
        entered |= {path.stem for path in called if path.is_relative_to(KERNELS)}


def run(folder: Path, *overrides: str) -> tuple[dict[int, dict[str, float]], dict[str, Any], set[str]]:
    """Rows and result of a run with a learned reward, and what of the kernels it entered."""
    with watched() as entered:
        result = start([*SMALL, f"log_dir={folder}", *overrides])
    return read_table(folder / "ppo/run/metrics.csv"), result, entered


@pytest.mark.parametrize("lora", ["all", "top", "none"])
def test_nothing_is_entered_when_it_is_off_and_all_when_it_is_on(lora: str, tmp_path: Path) -> None:
    """Sampling, scoring, learning, the third loss, the comparison and saving; the reward model follows the policy."""
    given = {"all": "model.lora.rank=2", "top": "model.lora.layers=1", "none": "model.lora=null"}[lora]
    models = [
        f"model.path={write_lm(tmp_path / 'lm', **WIDE)}",
        f"reward.path={write_reward_model(tmp_path / 'reward', **WIDE)}",
    ]
    on, fast, entered = run(tmp_path / "on", *models, given)
    off, plain, none = run(tmp_path / "off", "model.fast_cpu=false", *models, given)
    assert none == set()
    others = {"norm", *(["fast_adapters"] if lora == "none" else [])}  # norm: of Llama and Qwen2, see test_norm.py
    assert entered == FILES - others
    assert on.keys() == off.keys() == {1, 2}
    for step, row in off.items():
        assert on[step] == pytest.approx(row, rel=1e-3, abs=1e-4)
    for stage in ("sft", "ppo"):
        numbers = {name: value for name, value in plain[stage].items() if isinstance(value, float)}
        assert numbers
        assert {name: fast[stage][name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4)


def test_the_tests_of_models_rollout_and_modules_pass_without_it() -> None:
    """The whole of them, with every model loaded plain."""
    rooms = [f"tests/{room}" for room in ("models", "rollout", "modules")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *rooms]
    environment = os.environ | {"TEST_FAST_CPU": "false"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-5000:]
