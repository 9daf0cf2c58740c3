"""Where bad inputs are made, and the command run on them in this process."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # Python shows none of them


@dataclass(frozen=True)
class Place:
    """A folder for one bad input, and what all of them share and none may change."""

    tmp: Path
    lm: Path  # a random language model with its tokenizer
    reward_model: Path  # a random reward model
    run: Path  # a finished PPO run of two iterations

    @property
    def logs(self) -> Path:
        """Where the commands of the table put their runs."""
        return self.tmp / "logs"

    def fill(self, text: str) -> str:
        """A command or an answer with the paths of this place."""
        for name in ("tmp", "lm", "reward_model", "run"):
            text = text.replace(f"{{{name}}}", str(getattr(self, name)))
        return text

    def write(self, name: str, content: str | bytes) -> Path:
        """A file."""
        file = self.tmp / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return file

    def rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """A file of JSON lines, its texts as they are."""
        return self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def model(self, of: str = "lm") -> Path:
        """A copy of a shared model, to be broken."""
        return Path(shutil.copytree(getattr(self, of), self.tmp / "model"))

    def edit(self, file: Path, **changes: Any) -> None:
        """Other values in a JSON file; None takes a key out."""
        content = json.loads(file.read_text(encoding="utf-8")) | changes
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")

    def unfinished(self) -> Path:
        """A copy of the run that was killed after its last checkpoint."""
        folder = Path(shutil.copytree(self.run, self.logs / "ppo" / "tiny"))
        (folder / "result.json").unlink()
        return folder


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: Any
    out: str
    err: str


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """`python -m src.NAME ...` without a new process: its entry, its streams, Python's own warnings."""
    module, *rest = arguments
    name = f"src.{module}"
    found = importlib.import_module(name)
    entry = (importlib.import_module(f"{name}.__main__") if hasattr(found, "__path__") else found).main
    monkeypatch.setattr(sys, "argv", [name, *rest])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # taken back at the end; the entry sets it
    capsys.readouterr()
    code: Any = 0
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for kind in QUIET:
            warnings.simplefilter("ignore", kind)
        try:
            entry()
        except SystemExit as stopped:
            code = stopped.code
    streams = capsys.readouterr()
    warned = "".join(f"{w.message}\n" for w in shown)
    return Said(code, streams.out, warned + streams.err)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own; skips where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no command mount here")
    if done.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
