"""Why a dotted path leads to nothing that can be called: in a few words, with what to write instead."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

NOT_DOTTED = re.compile(r"[:/\\]|\.py(?=\.|$)|^\.|\.\.|\.$")  # my_rewards:brevity, ./my_rewards.py, .brevity
IMPORTERS = ("hydra", "importlib")


def why_not_found(target: str, error: BaseException) -> str:
    """Why Hydra cannot locate a target; `error` is what it met: of the import, or of a name that is not there."""
    if NOT_DOTTED.search(target):
        return f"write it with dots and without .py: {dotted(target)}"
    missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
    if missing and f"{target}.".startswith(f"{missing}."):
        parent, _, name = missing.rpartition(".")
        return _without(sys.modules[parent], name) if parent in sys.modules else _no_module(missing)
    in_hydra = error.__traceback__ is not None and error.__traceback__.tb_next is None
    if isinstance(error, AttributeError) and in_hydra:  # of a class; of a module it is a module that is not found
        return _without(error.obj, error.name)
    return why_not_imported(target, error)


def why_not_imported(target: str, error: BaseException) -> str:
    """What happened while the module of a target was imported, and in which line of its file."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _of_importer(f.filename)]
    file, line = (frames[0].filename, frames[0].lineno) if frames else (target.rpartition(".")[0] or target, None)
    message = f"failed: {error}" if isinstance(error, ImportError) else f"raised {error!r}"
    if isinstance(error, SyntaxError) and error.filename:
        file, line, message = error.filename, error.lineno, f"failed: {error.msg}"
    return f"importing {_short(file)} {message}" + (f" (line {line})" if line else "")


def why_not_callable(target: str, what: str) -> str:
    """Why a target that was found is no `what` (a function, a class)."""
    try:
        found = importlib.import_module(target)
    except ImportError:
        return f"is a value, not a {what}: it cannot be called"
    names = [f"{target}.{name}" for name in _own_names(found)]
    return f"is a module, not a {what}; give {' or '.join(names[:4]) or f'{target}.{what.upper()}'}"


def dotted(target: str) -> str:
    """A path as it was meant: with dots, and with the name of a function."""
    path = re.sub(r"\.py(?=[.:]|$)", "", target.removeprefix("./").removeprefix(".\\"))
    path = re.sub(r"[:/\\.]+", ".", path).strip(".")
    return path if "." in path else f"{path}.FUNCTION"


def _no_module(name: str) -> str:
    """That there is no such module, and files here of a similar name."""
    near = get_close_matches(name, [path.stem for path in Path.cwd().glob("*.py")], n=3)
    sentence = f"there is no module {name} in {Path.cwd()} (the working directory) or among the installed packages"
    return sentence + (f"; close to it: {', '.join(near)}" if near else "")


def _without(owner: Any, name: str) -> str:
    """That a module or class has no such name, and which it has instead."""
    near = get_close_matches(name, [own for own in dir(owner) if not own.startswith("_")], n=3)
    where = _short(owner.__file__) if getattr(owner, "__file__", None) else getattr(owner, "__name__", str(owner))
    hint = f"close to it: {', '.join(near)}" if near else f"it has {', '.join(_own_names(owner)[:5])}"
    return f"{where} has no {name}" + (f"; {hint}" if near or _own_names(owner) else "")


def _own_names(owner: Any) -> list[str]:
    """What a module defines that can be called."""
    if not isinstance(owner, ModuleType):
        return []
    public = {name: value for name, value in vars(owner).items() if callable(value) and not name.startswith("_")}
    return [name for name, value in public.items() if getattr(value, "__module__", None) == owner.__name__]


def _short(file: str) -> str:
    """A file's path, from the working directory if it is in there."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _of_importer(file: str) -> bool:
    return file.startswith("<frozen") or any(f"/{name}/" in Path(file).as_posix() for name in IMPORTERS)
