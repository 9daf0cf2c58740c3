"""The end of a run by a signal."""

from __future__ import annotations

import signal


class Interrupted(BaseException):
    """A signal ended the run; carries its number and the path of the last checkpoint (None: none)."""

    def __init__(self, signum: int, kept: str | None = None) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.kept = signum, kept

    def sentence(self) -> str:
        """The signal, the kept checkpoint, and how to resume."""
        kept = f"{self.kept} is kept" if self.kept else "no iteration was saved"
        return f"{self}: {kept}; the same command resumes (resume=never starts again)"
