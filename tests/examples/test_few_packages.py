"""torch, lightning, transformers, peft and jaxtyping are enough to train: nothing else of the project's is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.test_python_page import PAGE

ROOT = Path(__file__).parents[2]
ROOMS = ("core", "kernels", "models", "rewards", "rollout", "modules")
ABSENT = ("hydra", "omegaconf", "pydantic", "datasets", "wandb", "fastapi", "uvicorn", "httpx", "tenacity")
ABSENT += ("vaderSentiment", "typeguard")

WITHOUT = f"""
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

class Fewer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)

sys.meta_path = [Fewer if finder is PathFinder else finder for finder in sys.meta_path]
"""
IMPORTS = f"""
count = 0
for room in {ROOMS!r}:
    package = importlib.import_module(f"src.{{room}}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        count += 1
print(count, "modules")
"""
TRAINING = "\n".join(PAGE[:3]).replace("iterations=20", "iterations=2")


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own, in an empty folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize("name", ABSENT)
def test_the_list_is_of_packages_that_are_there(name: str) -> None:
    """Else a misspelt name would block nothing."""
    assert importlib.util.find_spec(name) is not None


@pytest.mark.slow
def test_the_rooms_import_and_train_without_the_rest(tmp_path: Path) -> None:
    done = python(WITHOUT + IMPORTS + TRAINING, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    count = int(done.stdout.split()[0])
    files = [path for room in ROOMS for path in (ROOT / "src" / room).rglob("*.py")]
    assert count == len(files) - len(ROOMS)  # an inner room counts as its __init__
    assert (tmp_path / "better" / "model" / "config.json").is_file()


def test_what_is_absent_cannot_be_imported(tmp_path: Path) -> None:
    done = python(WITHOUT + "import httpx", tmp_path)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'httpx'"
