"""The folder of a run: named after what was asked for, so that the same command finds it again."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

FINISHED = "result.json"  # written last: a folder with this file is a finished run


def run_folder(parent: Path, name: str | None, overrides: list[str], resume: str) -> Path:
    """`parent`/NAME, NAME-2, NAME-3...: the unfinished one to go on with, or the first free one.

    Without a name the overrides make one. With `resume="never"` an unfinished folder is left alone.
    """
    base = name or name_of(overrides)
    number = 1
    while True:
        folder = parent / (base if number == 1 else f"{base}-{number}")
        if not folder.exists() or (resume != "never" and not (folder / FINISHED).exists()):
            return folder
        number += 1


def name_of(overrides: list[str]) -> str:
    """A readable file name made of command-line overrides; long ones end in a hash of the whole."""
    text = ",".join(sorted(o for o in overrides if not o.startswith(("resume=", "stage=", "log_dir=")))) or "default"
    name = re.sub(r"[^\w.,=+-]+", "-", text)
    return name if len(name) <= 80 else f"{name[:71]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
