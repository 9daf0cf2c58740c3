"""The project is installed from a clone; a wheel, which would lack conf/, is refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("hook", ["build_wheel", "get_requires_for_build_wheel", "build_sdist"])
def test_a_wheel_is_refused_in_one_sentence(hook: str) -> None:
    code = f"import editable_only; editable_only.{hook}('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "packaging", capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install -e ." in done.stderr


def test_an_editable_install_is_built() -> None:
    code = "import editable_only; print(editable_only.get_requires_for_build_editable())"
    path = {"PYTHONPATH": str(ROOT / "packaging")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
