"""Lines for a terminal: wrapped at spaces, so that no word and no path is cut."""

from __future__ import annotations

import shutil
import sys
import textwrap
from io import TextIOWrapper
from typing import TextIO

from src.errors import without_secrets


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a text without passwords in addresses; wrapped to the width of a terminal, one line in a file or pipe."""
    stream, text = sys.stdout if stream is None else stream, without_secrets(text)
    print(wrapped(text) if stream.isatty() else text, file=stream)


def print_any_letter() -> None:
    """Let both streams write escapes for letters that a console's encoding lacks, as with LANG=C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def wrapped(text: str, width: int | None = None) -> str:
    """Lines of at most `width` columns (None: the terminal's); what follows in an indented line is indented further."""
    width = width or shutil.get_terminal_size().columns
    return "\n".join(_wrapped_line(line, width) for line in text.split("\n"))


def _wrapped_line(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line, width, subsequent_indent=indent + "  " if indent else "", break_long_words=False, break_on_hyphens=False,
        drop_whitespace=True, replace_whitespace=False,
    )  # fmt: skip
