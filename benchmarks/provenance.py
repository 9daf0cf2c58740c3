"""Where a table of results comes from: commit, day, processor, and the code that makes its numbers."""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
import tokenize
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parents[1]
# what can change a number that is measured; not the command line, logs, reports, chat and export
ROOMS = ("core", "data", "kernels", "models", "modules", "rewards", "rollout", "stages", "types.py")
WRITTEN = (":!docs", ":!benchmarks/results")
LAYOUT = {tokenize.NEWLINE: "\n", tokenize.INDENT: ">", tokenize.DEDENT: "<"}
IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)
STATEMENT_BEGINS = ("", *LAYOUT.values())


def source() -> dict[str, str]:
    """Commit, day, processor and threads of a measurement that ends now."""
    return {
        "commit": commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit, with `-dirty` when the code differs from it; tables and pages, which studies write, do not count."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", *WRITTEN], check=False).returncode
    return found.stdout.strip() + "-dirty" * changed


def provenance() -> str:
    """The same as a sentence, for the head of a table."""
    found = source()
    threads = f"{found['threads']} thread{'s' * (found['threads'] != '1')}"
    return f"Commit {found['commit']}, {found['date']}, {found['processor']}, {threads}, torch {found['torch']}."


def processor() -> str:
    """The processor's name and the widest instructions that torch uses on it, which names alone do not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def rooms(*scripts: str, root: Path = ROOT) -> dict[str, str]:
    """A digest of the code of every room that makes numbers, of the configuration, and of the study's own `scripts`.

    Comments, docstrings and layout do not count.
    """
    named = {room: root / "src" / room for room in ROOMS} | {name: root / name for name in scripts}
    found = {name: _digest(map(essence, map(_read, _python(path)))) for name, path in named.items()}
    values = (repr(yaml.safe_load(_read(path))) for path in sorted((root / "conf").rglob("*.yaml")))
    return found | {"conf": _digest(values)}


def essence(code: str) -> str:
    """The tokens of Python code that do something."""
    return "".join(_tokens(code))


def _tokens(code: str) -> Iterator[str]:
    before, kept = "", [t for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type not in IGNORED]
    for token, after in zip(kept, [*kept[1:], None], strict=True):
        text = LAYOUT.get(token.type, f"{token.string} ")
        ends = after is None or after.type == tokenize.NEWLINE
        if token.type == tokenize.STRING and before in STATEMENT_BEGINS and ends:
            text = ""  # a docstring
        elif text == "\n" and before in STATEMENT_BEGINS:
            text = ""  # the end of its line
        yield text
        before = text or before


def _python(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _digest(texts: Iterator[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
