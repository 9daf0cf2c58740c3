"""The groups, options and keys of a configuration with their meanings: the comments in `conf/`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from src.config import files
from src.config.errors import format_value
from src.config.schema import OPTIONS, RUNS, Run


def help_page(run: Run) -> RenderableType:
    """What `--help` lists: the groups that the stage reads, their options, and its keys with the values of `run`."""
    values, parts = dict(files.leaves(run.plain())), [_table("[bold]groups[/]")]
    for group, comment in commented_groups():
        if group in run.choices and _is_read(group, run):
            others = Text(f" ({', '.join(files.options(group))})", "dim")
            parts[0].add_row(f"  {group}=[cyan]{run.choices[group]}[/]", Text(comment).append_text(others))
    for title, path in _files(run):
        own = [(key, meaning) for key, _, meaning in files.commented_keys(path) if key in values]
        parts += [_table(f"[bold]{title}[/]")] if own else []
        for key, meaning in own:
            parts[-1].add_row(f"  {key}=[cyan]{escape(format_value(values.pop(key)).strip(chr(39)))}[/]", meaning)
    return Group(*parts)


def commented_groups() -> Iterator[tuple[str, str]]:
    """Every group with its comment: those of train.yaml, each followed by the groups that its options bring along."""
    for group, comment in files.chosen_groups(files.CONF / "train.yaml").items():
        yield group, comment
        for other in [o for o in files.groups() if group in files.brings().get(o, {})]:
            option = files.brings()[other][group][-1]
            yield other, files.chosen_groups(files.CONF / group / f"{option}.yaml")[other]


def _is_read(group: str, run: Run) -> bool:
    node = OPTIONS.get(group, ("",))[0] or ("ppo" if group == "preset" else "seed")
    return node in RUNS[run.stage].model_fields


def _files(run: Run) -> Iterator[tuple[str, Path]]:
    """The files that declare the keys of a run, each with a heading."""
    yield "every stage", files.CONF / "train.yaml"
    yield f"stage={run.stage}", files.CONF / "stages" / f"{run.stage}.yaml"
    for group, _ in commented_groups():
        if group not in ("experiment", "preset") and group in run.choices:
            yield f"{group}={run.choices[group]}", files.CONF / group / f"{run.choices[group]}.yaml"
            yield group, files.CONF / group / f"{files.HIDDEN}.yaml"


def _table(title: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_row(title)
    return table
