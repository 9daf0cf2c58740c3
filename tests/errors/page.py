"""docs/errors.md, written from the table."""

from __future__ import annotations

from pathlib import Path

from tests.errors.table import GROUPS, Case

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
INTRO = """\
# Bad input

What a command answers to input that it cannot use. The answer is one sentence on stderr after `error: `, without a
traceback; the exit code is 2, and 128 + its number after a signal. What was computed before stays. Every row is a test
(`tests/errors/`) that makes the input and runs the command; this page is written by `python -m tests.errors`.

`…` stands for words of a library or for a text of the input; `MODEL`, `REWARD` and `RUN` for the folders of a language
model, a reward model and a finished run. Commands are shortened to what matters; those of `src.train` name `MODEL`
and a `log_dir` besides. With exit code 0 the answer is part of what is printed.
"""
NAMES = {
    "{tmp}/logs": "logs",
    "{tmp}/": "",
    "{tmp}": "FOLDER",
    "{lm}": "MODEL",
    "{reward_model}": "REWARD",
    "{run}": "RUN",
}


def page() -> str:
    """The text of the page."""
    parts = [INTRO]
    for group, cases in GROUPS.items():
        rows = "\n".join(_row(case) for case in cases)
        parts.append(f"## {group}\n\n| given | command | answer | exit | kept |\n|---|---|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def _row(case: Case) -> str:
    command = case.command.encode("utf-8", "backslashreplace").decode()
    cells = [case.given, f"`{_shown(command)}`", f"`` {_shown(case.answer)} ``", str(case.code), case.kept]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _shown(text: str) -> str:
    for part, name in NAMES.items():
        text = text.replace(part, name)
    longest = max(text.split(), key=len)
    return text.replace(longest, f"{longest[:20]}…") if len(longest) > 250 else text
