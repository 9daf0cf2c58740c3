"""Where a table of results comes from."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from src.runs.report import git_revision


def provenance() -> str:
    """Commit, date and processor, for the head of a table."""
    threads = torch.get_num_threads()
    return (
        f"Commit {git_revision()}, {datetime.now(UTC):%Y-%m-%d}, {processor()}, {threads} thread{'s' * (threads > 1)}, "
        f"torch {torch.__version__}."
    )


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
