"""The checks as a table that fits into 80 columns, and into a bug report."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from src.errors import without_secrets
from src.utils.check import Check
from src.utils.terminal import shown

STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}


def table_of(checks: Sequence[Check]) -> Table:
    """A row per check: name, level, what was found, and how to mend it."""
    table = Table(title=summary(checks), box=SIMPLE_HEAD)
    table.add_column("examined", no_wrap=True, max_width=22)
    table.add_column("", no_wrap=True)
    table.add_column("found, and how to mend it", overflow="fold")
    for check in checks:
        text = Text(_plain(check.found))
        if check.mend:
            text.append(f"\n-> {_plain(check.mend)}", style="italic")
        table.add_row(Text(check.name), Text(check.level, style=STYLES[check.level]), text)
    return table


def summary(checks: Sequence[Check]) -> str:
    """How many faults and warnings there are."""
    count = {level: sum(check.level == level for check in checks) for level in STYLES}
    return ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in count.items() if level != "ok") + (
        f" in {len(checks)} checks"
    )


def _plain(text: str) -> str:
    return shown(without_secrets(text))
