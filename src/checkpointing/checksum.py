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
