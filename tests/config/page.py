"""docs/options.md, written from the comments in conf/."""

from __future__ import annotations

from pathlib import Path

from src.config.files import CONF, HIDDEN, brings, commented_keys, headline, options, read
from src.config.help import commented_groups

PAGE = CONF.parent / "docs" / "options.md"
INTRO = """\
# Every option

`python -m src.train GROUP=OPTION KEY=VALUE`. Below each group are its options, below an option the keys that it adds,
with the values that they have unless the model, the experiment or the preset sets others. A group that is brought along
exists only with those options. This page is made from `conf/` by `python -m tests.config`.
"""


def page() -> str:
    """The text of the page."""
    lines = [INTRO, "## Every run", "", *_rows(CONF / "train.yaml")]
    for path in sorted((CONF / "stages").glob("*.yaml")):
        lines += ["", f"## stage={path.stem}", "", headline(path), "", *_rows(path)]
    for group, comment in commented_groups():
        with_it = [f"{parent}={option}" for parent, own in brings().get(group, {}).items() for option in own]
        lines += ["", f"## {group}", "", comment[:1].upper() + comment[1:] + "."]
        lines += ["", f"Brought along by {', '.join(with_it)}."] if with_it else []
        folder, shared = CONF / group, _rows(CONF / group / f"{HIDDEN}.yaml")
        heirs = [path.stem for path in sorted(folder.glob("*.yaml")) if HIDDEN in str(read(path).get("defaults"))]
        lines += ["", f"Keys of {', '.join(heirs)}:", "", *shared] if shared else []
        for path in (folder / f"{option}.yaml" for option in options(group)):
            own = _rows(path) if group not in ("experiment", "preset") else []
            lines += ["", f"**{group}={path.stem}**: {headline(path)}", *([""] if own else []), *own]
    return "\n".join(lines) + "\n"


def _rows(path: Path) -> list[str]:
    found = [(key, value, meaning.replace("|", "&#124;")) for key, value, meaning in commented_keys(path)]
    rows = [f"| `{key}` | `{value}` | {meaning} |" for key, value, meaning in found]
    return ["| key | value | meaning |", "|---|---|---|", *rows] if rows else []
