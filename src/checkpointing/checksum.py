"""Files that are written atomically, with a checksum that shows later damage."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

SEAL = b"sha256:"  # a sealed file ends in this and 32 bytes, the SHA-256 of all bytes before
LENGTH = len(SEAL) + 32
SUMS = "checksums.txt"  # of the models in a run's folder, as `sha256sum -c checksums.txt` reads it


class DirectWrite(TorchCheckpointIO):
    """Writes directly to its path; Lightning's own class writes to the folder for temporary files first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Raises `OSError` when the disk is full."""
        try:
            with open(path, "wb") as file:  # with a path torch.save would hide the error of the disk
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch closes its archive on exit, which fails again
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def seal(temporary: Path, final: Path) -> None:
    """Append the checksum, flush the file to the disk, rename it, flush the folder; both are in the same folder.

    After a kill at any moment `final` is the old file or the whole new one. Readers of zip files such as torch.load
    ignore the bytes at the end. Raises `OSError` when the disk is full.
    """
    with temporary.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").digest()  # the file's position is now at its end
        file.write(SEAL + digest)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, final)


def rename(temporary: Path, final: Path) -> None:
    """Rename a flushed file and flush the folder, so that the new name survives a power failure."""
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def checksum_matches(path: Path) -> bool:
    """Whether the file ends in the checksum of the bytes before it; False also for an unreadable file."""
    try:
        with path.open("rb") as file:
            left = path.stat().st_size - LENGTH
            digest = hashlib.sha256()
            while left > 0 and (piece := file.read(min(left, 1 << 20))):
                digest.update(piece)
                left -= len(piece)
            return left == 0 and file.read() == SEAL + digest.digest()
    except OSError:
        return False


def seal_models(folder: Path) -> None:
    """Write `checksums.txt` of everything in the folders `model` and `adapter`; replaces an older one."""
    files = sorted(file for part in ("model", "adapter") for file in (folder / part).rglob("*") if file.is_file())
    lines = [f"{_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    temporary = folder / "checksums.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, folder / SUMS)


def damaged_models(folder: Path) -> list[str]:
    """The files that `checksums.txt` lists and that are not there or are others; itself if it is not readable.

    Empty for a folder without one.
    """
    try:
        lines = [line.partition("  ") for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError):
        return [SUMS]
    if not all(name for _, _, name in lines):
        return [SUMS]
    return [name for digest, _, name in lines if _sha256(folder / name) != digest]


def _sha256(path: Path) -> str:
    """The checksum in hex digits; empty for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
