"""What is wrong with a run, as far as its numbers tell, and what it has reached."""

from __future__ import annotations

import math
from dataclasses import dataclass

from src.report.alarms import mean, replayed
from src.report.bands import Left, band_of_run, band_title, left
from src.report.metrics import metric_of
from src.report.read import RunData, figures

END = 0.1  # of the rows of a run: those at its end
TITLES = {
    "score": "score of the reward",
    "gold": "gold score",
    "greedy_score": "score, greedy decoding",
    "kl": "KL to the reference (nats per sequence)",
    "response_length": "response length (tokens)",
    "eos_fraction": "share ended by EOS",
    "grammatical": "share of grammatical sentences",
    "distinct": "share of distinct responses",
    "distinct_2": "share of distinct bigrams",
    "distinct_prompts": "share of distinct prompts",
    "reference_nats": "nats per token under the reference",
}
LOGGED = ("score", "gold", "kl", "response_length")  # those of them that each iteration logs, as `rollout/NAME`


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong: what, the numbers, and what to try; `curves` are those that left a band."""

    what: str
    numbers: str
    cure: str
    curves: tuple[Left, ...] = ()


@dataclass(frozen=True)
class Reached:
    """A figure before and after PPO, or at the start and at the end so far; intervals are 95%."""

    name: str
    title: str
    before: str
    after: str
    change: str


def reached(run: RunData) -> list[Reached]:
    """The figures of the final comparison; without one, the first logged row and the mean of the last tenth."""
    groups = figures(run.result)
    if {"sft", "ppo"} <= set(groups):
        before, change = groups["sft"], groups.get("improvement", {})
        return [
            Reached(name, TITLES.get(name, name), _text(before.get(name)), _text(after), _text(change.get(name), "+"))
            for name, after in groups["ppo"].items()
        ]
    rows = [row for _, row in sorted(run.metrics.items())]
    found = []
    for name in LOGGED:
        values = [row[f"rollout/{name}"] for row in rows if f"rollout/{name}" in row]
        if values:
            last = mean(at_end(values))
            found.append(Reached(name, TITLES[name], f"{values[0]:.3f}", f"{last:.3f}", f"{last - values[0]:+.3f}"))
    return found


def findings(run: RunData) -> list[Finding]:
    """What left its healthy range over the last tenth of the rows, what is not finite, scores that did not move."""
    names = sorted({name for row in run.metrics.values() for name in row})
    columns = {name: [row[name] for _, row in sorted(run.metrics.items()) if name in row] for name in names}
    found = []
    for name, values in columns.items():
        metric, last = metric_of(name), at_end(values)
        broken = sum(not math.isfinite(value) for value in values)
        if broken:
            found.append(Finding(f"{name} is not finite", f"in {broken} of {len(values)} rows", "docs/safety.md"))
        elif not metric.inside(mean(last)):
            numbers = f"{mean(last):.4g} over the last {len(last)} rows, healthy: {metric.healthy}"
            found.append(Finding(f"{name} is out of its healthy range", numbers, metric.bad or ""))
    return [*_of_scores(run), *_alarms(run), *_of_band(run), *found]


def _of_band(run: RunData) -> list[Finding]:
    """The curves that left the band of the run's experiment, as one finding."""
    band = band_of_run(run)
    curves = [] if band is None else left(run.metrics, band)
    if band is None or not curves:
        return []
    what = f"{len(curves)} {'curve' if len(curves) == 1 else 'curves'} left {band_title(run, band)}"
    first = f"first {curves[0].name} {curves[0].numbers()}"
    return [Finding(what, first, "What left first is nearest to the cause", tuple(curves))]


def _alarms(run: RunData) -> list[Finding]:
    """The alarms of the run, as they were or would have been given while it trained."""
    steps, planned = sorted(run.metrics), run.config.get("ppo")
    limit = planned.get("max_grad_norm") if isinstance(planned, dict) else None
    known = {"max_grad_norm": float(limit)} if isinstance(limit, int | float) else {}
    return [
        Finding(
            f"{alarm.rule.name} ({alarm.numbers})",
            f"at step {steps[alarm.row - 1]}. Likely cause: {alarm.rule.cause}",
            f"Try: {alarm.rule.cure}",
        )
        for alarm in replayed([run.metrics[step] | known for step in steps])
        if alarm.rule.name != "not finite"  # said below, with the number of rows
    ]


def at_end(values: list[float]) -> list[float]:
    """The last tenth, at least one."""
    return values[-max(1, math.ceil(len(values) * END)) :]


def _of_scores(run: RunData) -> list[Finding]:
    """A score that did not improve."""
    found = []
    value, interval = figures(run.result).get("improvement", {}).get("score", (math.nan, None))
    if interval is not None and interval[0] <= 0:
        numbers = f"PPO minus SFT: {value:+.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
        found.append(Finding("the score did not improve", numbers, metric_of("rollout/score").bad or ""))
    return found


def _text(figure: tuple[float, list[float] | None] | None, sign: str = "") -> str:
    if figure is None:
        return ""
    value, interval = figure
    ends = f" ({interval[0]:{sign}.3f} to {interval[1]:{sign}.3f})" if interval is not None else ""
    return f"{value:{sign}.3f}{ends}"
