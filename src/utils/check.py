"""The record of one thing that was examined before a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Check:
    """What was measured, whether it is sound, and how to mend it.

    A fault makes the run's numbers wrong, or ends it; a warning may be wanted.
    """

    name: str
    found: str
    level: Level = "ok"
    mend: str = ""


def checked(name: str, found: str, mend: str, *, fault: bool = False, warning: bool = False) -> Check:
    """The check at the level that the conditions say; `mend` is kept where there is something to mend."""
    level: Level = "fault" if fault else "warning" if warning else "ok"
    return Check(name, found, level, "" if level == "ok" else mend)
