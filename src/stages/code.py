"""Fingerprints of the code that a configuration names: a run is not resumed with another reward function in silence."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.config.files import leaves
from src.config.schema import Run
from src.stages.objects import instantiate

LIBRARIES = ("torch", "lightning", "transformers", "peft")  # whose versions are compared instead
OF_MODEL = "model.path"  # the name of the code in a model's folder


def code_of(run: Run) -> dict[str, str]:
    """Target -> SHA-256 (64 hex digits) of the files that it comes from, for every `_target_` but loggers.

    These are the module that the target names, the one in which its function or class is written, and those of its
    base classes; with `model.trust_remote_code` also the Python files in the model's folder. What they import, read
    or ask is not covered. Raises `ConfigError` for a target that leads nowhere.
    """
    targets = {key: str(value) for key, value in leaves(run.plain()) if key.endswith("._target_")}
    found = {target: _digest(modules_of(target, key)) for key, target in targets.items() if _counts(key, target)}
    folder = Path(run.model.path or "").expanduser()
    if run.model.trust_remote_code and run.model.path and folder.is_dir():
        found[OF_MODEL] = _digest(folder.glob("*.py"))
    return found


def own_code(code: dict[str, str]) -> dict[str, str]:
    """The first 12 digits of the fingerprints of code that is not this project's, whose revision says as much."""
    return {name: digest[:12] for name, digest in code.items() if not name.startswith("src.")}


def modules_of(target: str, key: str) -> set[Path]:
    """The files that a target comes from, without those of libraries and of modules that have none."""
    found = instantiate({"_target_": target, "_partial_": True}, key.removesuffix("._target_")).func
    above = inspect.getmro(found) if isinstance(found, type) else ()
    names = {getattr(part, "__module__", None) for part in (found, *above)} | set(_parents(target))
    own = [name for name in names if isinstance(name, str) and not _of_library(name)]
    files = [getattr(sys.modules.get(name), "__file__", None) for name in own]
    return {Path(file) for file in files if file is not None}


def _parents(target: str) -> Iterator[str]:
    """The module that a target names: the longest beginning of it that is one."""
    parts = target.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    yield from [name for name in names if name in sys.modules][:1]


def _counts(key: str, target: str) -> bool:
    return not key.startswith("logger.") and not _of_library(target)


def _of_library(name: str) -> bool:
    top = name.partition(".")[0]
    return top in LIBRARIES or top in sys.stdlib_module_names


def _digest(files: Any) -> str:
    """SHA-256 of the files' contents, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.name, file)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
