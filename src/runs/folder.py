"""The folder of a run, named after its overrides, so that the same command finds it again."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

from filelock import FileLock, Timeout

from src.checkpointing.checksum import SUMS, damaged_models
from src.errors import ConfigError

log = logging.getLogger(__name__)

FINISHED = "result.json"  # written last: a folder with this file is a finished run
FOLDERS = ("checkpoints", "samples", "model", "adapter", "nonfinite")  # what a run makes in its own
NOT_IN_NAMES = ("resume=auto", "resume=never", "allow_config_change=", "stage=", "log_dir=", "name=")


def run_folder(parent: Path, name: str | None, overrides: list[str], resume: str) -> Path:
    """`parent`/NAME, NAME_run-2, NAME_run-3...: the unfinished one to resume, or the first free one.

    NAME is made from the overrides when `name` is None. With `resume="never"` an unfinished folder is skipped.
    """
    for folder in run_folders(parent, name, overrides):
        if not folder.exists() or (resume != "never" and not has_result(folder)):
            return folder
    raise AssertionError("there is always a free name")


def run_folders(parent: Path, name: str | None, overrides: list[str]) -> Iterator[Path]:
    """All folders that a run with these overrides may have, without end."""
    base = name_of(overrides) if name is None else str(name)
    yield parent / base
    yield from (parent / f"{base}_run-{number}" for number in count(2))


def has_result(folder: Path) -> bool:
    """Whether a run's last file is there; an empty one, as a power failure leaves it, counts as none."""
    file = folder / FINISHED
    return file.is_file() and file.stat().st_size > 0


def name_of(overrides: list[str]) -> str:
    """A readable file name made from command-line overrides, such as `ppo.clip-0.1_seed-2`.

    It has no `=` and no comma, so that a folder can be the value of an override. A long name, or one with replaced
    characters, ends in a hash of all overrides: different overrides never share a folder.
    """
    chosen = sorted(override for override in overrides if not override.startswith(NOT_IN_NAMES))
    if not chosen:
        return "default"
    name = "_".join(re.sub(r"[^\w.+-]+", "-", _short(override)) for override in chosen)
    exact = all(re.fullmatch(r"[\w.+-]+=[\w.+-]+", override) for override in chosen)
    if exact and len(name) <= 80:
        return name
    return f"{name[:71]}-{hashlib.sha256(chr(0).join(chosen).encode()).hexdigest()[:8]}"


def _short(override: str) -> str:
    """`key-value`; of a path only its last part."""
    key, _, value = override.partition("=")
    return "-".join((key, value.strip("'\"/").rsplit("/", 1)[-1]))


def make_folder(folder: Path) -> None:
    """Make the folder. Raises `OSError` when nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink(missing_ok=True)  # a parallel job may have removed it


def make_writable(folder: Path) -> None:
    """Make the folder for a result. Raises `ConfigError` when nothing can be written there."""
    try:
        make_folder(folder)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} ({error.strerror}): choose another with out=FOLDER") from error


def own_folder(folder: Path) -> FileLock:
    """Make the folder and keep other runs out of it until the returned lock is released.

    Raises `ConfigError` while another process trains there. The system releases the lock of a killed process.
    """
    make_folder(folder)
    for path in (folder / name for name in FOLDERS):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file, and the run needs a folder of that name: move it away")
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"{folder}: another process is training there; wait for it, stop it, or give this run another name=..."
        ) from error
    return lock


def set_aside_damaged(folder: Path, made_again: str) -> None:
    """Rename a finished run whose model is not the one that was sealed, or that has lost its result, and say so.

    A link to such a run is removed, and the run itself stays where it is. Does nothing for an intact or missing one.
    """
    if not folder.exists():
        folder.unlink(missing_ok=True)  # a link to a folder that was deleted
        return
    needed = {FINISHED: has_result(folder), "model": (folder / "model").is_dir(), SUMS: (folder / SUMS).is_file()}
    found = [f"{name} is missing" for name, is_there in needed.items() if not is_there]
    found += [f"{name} is not what was written" for name in damaged_models(folder)]
    if not found:
        return
    if folder.is_symlink():
        where = folder.resolve()
        folder.unlink()
    else:
        names = chain(["damaged"], (f"damaged-{number}" for number in count(2)))
        where = next(
            path for path in (folder.with_name(f"{folder.name}.{name}") for name in names) if not path.exists()
        )
        folder.rename(where)
    log.warning(f"{folder}: {', '.join(found[:3])}: it is kept as {where}, and {made_again}")
