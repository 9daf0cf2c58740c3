"""docs/metrics.md, written from src/report/metrics.yaml."""

# ruff: noqa: E501, the lines of the page

from __future__ import annotations

from pathlib import Path

from src.report.metrics import Metric, groups

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
INTRO = """\
# Logged numbers

Every number that a run logs: its meaning, a healthy value, and the cause of a bad one. The same names are in `metrics.csv`,
`timing.csv` and, with `logger=wandb`, on the dashboard; `report.html` draws them with their healthy range. Made from
`src/report/metrics.yaml` by `python -m tests.report`.

The column `step` is the iteration in the PPO stage and the optimizer step in the other two, counted from 1. PPO writes a row
every `ppo.log_every` iterations, the others every `sft.log_every` and `reward_model.log_every` steps. Rows hold means over an
iteration: over all its responses, or over all counted tokens of all its epochs and minibatches. "Healthy" is a rule of thumb;
where it is a range of numbers, the report names what has left it over the last tenth of a run.
"""
OUTRO = """
## Two tables

`metrics.csv` holds only numbers that repeat exactly ([determinism.md](determinism.md)), `timing.csv` those that start with
`time/`. `curves.png` draws the most important columns, `report.html` all of them ([tools.md](tools.md)).
"""


def page() -> str:
    """The text of the page."""
    lines = [INTRO]
    for group in groups():
        about = f": {group.about}" if group.about else ""
        lines += [
            f"## {group.name}{about}",
            "",
            "| name | meaning, unit | healthy | a bad value means |",
            "|---|---|---|---|",
        ]
        lines += [*map(_row, group.metrics), ""]
    return "\n".join(lines)[:-1] + OUTRO


def _row(metric: Metric) -> str:
    meaning = metric.meaning + (f"; {metric.unit}" if metric.unit else "")
    ends = metric.range or (None, None)
    texts = [f"{end:g}" if end is not None else "" for end in ends]
    within = "" if metric.range is None or texts[0] == texts[1] else f" ({_between(*texts)})"
    cells = [f"`{metric.name}`", meaning, (metric.healthy or "") + within, metric.bad or ""]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _between(low: str, high: str) -> str:
    return f"{low} to {high}" if low and high else f"{low} or more" if low else f"{high} or less"
