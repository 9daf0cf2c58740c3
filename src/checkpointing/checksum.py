"""Files that are there whole or not at all, and that show when they were damaged later."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

SEAL = b"sha256:"  # a sealed file ends in this and the 32 bytes of the SHA-256 of all before it
LENGTH = len(SEAL) + 32


class DirectWrite(TorchCheckpointIO):
    """Writes straight to the path it is given; Lightning's own takes the way through the folder for temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Raises `OSError` when the disk is full."""
        try:
            with open(path, "wb") as file:  # a path given to torch.save would hide what was wrong with the disk
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch closes its archive on the way out, and stumbles again
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def seal(temporary: Path, final: Path) -> None:
    """Append the checksum, flush the file to the disk, rename it, flush the folder; both lie in the same folder.

    A kill at any moment leaves `final` as it was, or whole. Readers of zip files, torch.load among them, pay no heed
    to the bytes at the end. Raises `OSError` when the disk is full.
    """
    with temporary.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").digest()  # leaves the file at its end
        file.write(SEAL + digest)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, final)


def rename(temporary: Path, final: Path) -> None:
    """Put a flushed file into its place, and flush the folder, so that the new name lasts."""
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def checksum_matches(path: Path) -> bool:
    """Whether the file ends in the checksum of all before its end; False also for one that cannot be read."""
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
