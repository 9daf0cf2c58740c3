"""What is wrong with a run, as far as its numbers tell, and what it has reached."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
}
LOGGED = ("score", "gold", "kl", "response_length")  # those of them that each iteration logs, as `rollout/NAME`


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong: what, the numbers, and what to try."""

    what: str
    numbers: str
    cure: str


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
    return [*_of_scores(run, columns), *found]


def at_end(values: list[float]) -> list[float]:
    """The last tenth, at least one."""
    return values[-max(1, math.ceil(len(values) * END)) :]


def mean(values: list[float]) -> float:
    """The mean of some numbers."""
    return sum(values) / len(values)


def _of_scores(run: RunData, columns: dict[str, list[float]]) -> list[Finding]:
    """A score that did not improve, and gold that fell while the score grew."""
    found = []
    value, interval = figures(run.result).get("improvement", {}).get("score", (math.nan, None))
    if interval is not None and interval[0] <= 0:
        numbers = f"PPO minus SFT: {value:+.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
        found.append(Finding("the score did not improve", numbers, metric_of("rollout/score").bad or ""))
    gold, score = columns.get("rollout/gold", []), columns.get("rollout/score", [])
    size = max(1, len(gold) // 10)
    windows = [(mean(score[i : i + size]), mean(gold[i : i + size])) for i in range(0, len(gold) - size + 1, size)]
    if len(windows) >= 5 and len(score) == len(gold):
        best = max(range(len(windows)), key=lambda i: windows[i][1])
        (score_then, gold_then), (score_now, gold_now) = windows[best], windows[-1]
        if score_now > score_then and gold_then - gold_now > 0.1 * (gold_then - min(g for _, g in windows)):
            numbers = f"gold {gold_then:.3f} -> {gold_now:.3f} while the score went {score_then:.3f} -> {score_now:.3f}"
            cure = "the reward model is exploited: early_stop=gold, or a larger ppo.kl_coef"
            found.append(Finding("gold fell while the score grew", numbers, cure))
    return found


def _text(figure: tuple[float, list[float] | None] | None, sign: str = "") -> str:
    if figure is None:
        return ""
    value, interval = figure
    ends = f" ({interval[0]:{sign}.3f} to {interval[1]:{sign}.3f})" if interval is not None else ""
    return f"{value:{sign}.3f}{ends}"
