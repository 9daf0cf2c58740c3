"""Signs of a sick run in its logged numbers: the rules of the alarms while it trains, and of its page.

They tell after the fact, and by rules of thumb: a run without an alarm may be sick, and one with an alarm may be well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Rows = Sequence[Mapping[str, float]]  # the logged numbers of the iterations so far, in their order

SHORT, LONG = 5, 20  # rows
READ = (  # what the rules read of earlier rows; the last one must be finite as a whole
    *("rollout/score", "rollout/score_std", "rollout/gold", "rollout/kl", "rollout/response_length"),
    *("rollout/eos_fraction", "rollout/distinct", "policy/ratio", "policy/old_kl", "policy/clip_fraction"),
    *("policy/entropy", "policy/grad_norm", "max_grad_norm", "critic/explained_variance"),
)
REPLAYED = 300  # rows of a long run after which the rules are asked again


@dataclass(frozen=True)
class Rule:
    """`check` gives the numbers when something is wrong, else None."""

    name: str
    check: Callable[[Rows], str | None]
    cause: str
    cure: str


@dataclass(frozen=True)
class Alarm:
    """A rule that fired, with the row after which it did, counted from 1."""

    rule: Rule
    row: int
    numbers: str

    def sentence(self) -> str:
        """All of it on one line."""
        return f"{self.rule.name}: {self.numbers}. Likely cause: {self.rule.cause}. Try: {self.rule.cure}"


def fired(rows: Rows, already: Sequence[str] = ()) -> list[Alarm]:
    """The alarms after the last row, without the rules that have fired before."""
    open_rules = [rule for rule in RULES if rule.name not in already]
    found = [(rule, rule.check(rows)) for rule in open_rules if rows]
    return [Alarm(rule, len(rows), numbers) for rule, numbers in found if numbers is not None]


def replayed(rows: Rows) -> list[Alarm]:
    """The first alarm of each rule over a run; of a long one about every `len(rows) / REPLAYED`-th row is asked."""
    found: list[Alarm] = []
    step = -(-len(rows) // REPLAYED) or 1
    for end in sorted({*range(step, len(rows) + 1, step), len(rows)}):
        found += fired(rows[:end], [alarm.rule.name for alarm in found])
    return found


def gold_falls(scores: Sequence[float], golds: Sequence[float]) -> str | None:
    """Whether gold fell, by a tenth of what it moved or more, from its best tenth of the run while the score grew."""
    size = max(1, len(golds) // 10)
    starts = range(0, len(golds) - size + 1, size)
    windows = [(mean(scores[i : i + size]), mean(golds[i : i + size])) for i in starts]
    if len(golds) < LONG:
        return None
    best = max(range(len(windows)), key=lambda i: windows[i][1])
    (score_then, gold_then), (score_now, gold_now) = windows[best], windows[-1]
    if score_now <= score_then or gold_then - gold_now <= 0.1 * (gold_then - min(gold for _, gold in windows)):
        return None
    return f"gold {gold_then:.3g} -> {gold_now:.3g} while the score went {score_then:.3g} -> {score_now:.3g}"


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers."""
    return sum(values) / len(values)


def _last(rows: Rows, name: str, count: int) -> list[float]:
    """The last `count` values; empty if one of the last rows lacks the number, or there are fewer."""
    values = [row[name] for row in rows[-count:] if name in row]
    return values if len(values) == count else []


def _change(rows: Rows, name: str) -> tuple[float, float] | None:
    """Mean of the first and of the last `SHORT` rows, once there are twice as many."""
    first, last = [row[name] for row in rows[:SHORT] if name in row], _last(rows, name, SHORT)
    return (mean(first), mean(last)) if last and len(first) == SHORT and len(rows) >= 2 * SHORT else None


def _critic(rows: Rows) -> str | None:
    values = _last(rows, "critic/explained_variance", LONG)
    return f"explained variance at most {max(values):.2g} for {LONG} rows" if values and max(values) < 0.05 else None


def _entropy(rows: Rows) -> str | None:
    change = _change(rows, "policy/entropy")
    collapsed = change and change[1] < 0.05 * change[0] and not _knows(rows)
    return "entropy {:.3g} -> {:.3g} nats per token".format(*change) if change and collapsed else None


def _knows(rows: Rows) -> bool:
    """Whether the score rose, varies half as much as at first or less, and answers differ as before: they are right."""
    names = ("rollout/score", "rollout/score_std", "rollout/distinct")
    score, spread, distinct = (_change(rows, name) for name in names)
    if score is None or spread is None or distinct is None:
        return False
    return score[1] > score[0] and spread[1] <= 0.5 * spread[0] and distinct[1] >= 0.75 * distinct[0]


def _length(rows: Rows) -> str | None:
    change = _change(rows, "rollout/response_length")
    outside = change and not 0.4 * change[0] <= change[1] <= 1.75 * change[0]
    return "{:.1f} -> {:.1f} tokens".format(*change) if change and outside else None


def _kl_large(rows: Rows) -> str | None:
    kl, length = _last(rows, "rollout/kl", 3), _last(rows, "rollout/response_length", 3)
    large = kl and length and mean(kl) > mean(length)
    return f"{mean(kl):.3g} nats per sequence, above 1 nat per token" if large else None


def _kl_sign(rows: Rows) -> str | None:
    kl, old_kl = _last(rows, "rollout/kl", SHORT), _last(rows, "policy/old_kl", 1)
    if kl and mean(kl) < -0.5:
        return f"KL to the reference {mean(kl):.3g} nats per sequence over {SHORT} rows"
    return f"KL(old || new) {old_kl[0]:.3g} nats per token" if old_kl and old_kl[0] < -1e-3 else None


def _ratio(rows: Rows) -> str | None:
    ratio = _last(rows, "policy/ratio", 1)
    return f"mean ratio {ratio[0]:.3g}" if ratio and not 0.5 <= ratio[0] <= 2 else None


def _never_clipped(rows: Rows) -> str | None:
    clipped, moved = _last(rows, "policy/clip_fraction", LONG), _last(rows, "policy/old_kl", LONG)
    dead = clipped and moved and max(clipped) == 0 and max(moved) > 0
    return f"no token clipped in {LONG} rows; KL(old || new) at most {max(moved):.2g}" if dead else None


def _always_clipped(rows: Rows) -> str | None:
    clipped = _last(rows, "policy/clip_fraction", SHORT)
    return f"{min(clipped):.0%} of the tokens or more for {SHORT} rows" if clipped and min(clipped) > 0.5 else None


def _variance(rows: Rows) -> str | None:
    spread = _last(rows, "rollout/score_std", SHORT)
    same = spread and max(spread) < 1e-6
    return f"the scores of an iteration do not differ, for {SHORT} rows" if same else None


def _gold(rows: Rows) -> str | None:
    both = [
        (row["rollout/score"], row["rollout/gold"]) for row in rows if {"rollout/score", "rollout/gold"} <= set(row)
    ]
    return gold_falls([score for score, _ in both], [gold for _, gold in both])


def _repeats(rows: Rows) -> str | None:
    change = _change(rows, "rollout/distinct")
    fewer = change and change[1] < 0.5 * change[0]
    return "share of distinct responses {:.2f} -> {:.2f}".format(*change) if change and fewer else None


def _eos(rows: Rows) -> str | None:
    change = _change(rows, "rollout/eos_fraction")
    fewer = change and change[1] < 0.5 * change[0]
    return "share ended by EOS {:.2f} -> {:.2f}".format(*change) if change and fewer else None


def _gradient(rows: Rows) -> str | None:
    norms, limit = _last(rows, "policy/grad_norm", LONG), _last(rows, "max_grad_norm", 1)
    clipped = norms and limit and min(norms) > 10 * limit[0]
    return f"gradient norm {min(norms):.3g} or more for {LONG} rows, clipped to {limit[0]:g}" if clipped else None


def _not_finite(rows: Rows) -> str | None:
    # what is measured has a slash in its name; max_grad_norm is a setting, and infinite where nothing is clipped
    broken = [name for name, value in rows[-1].items() if "/" in name and not math.isfinite(value)]
    return ", ".join(broken) if broken else None


RULES = (
    Rule("not finite", _not_finite, "steps too large, or an overflow", "a lower ppo.lr, float32, docs/safety.md"),
    Rule(
        "critic explains nothing",
        _critic,
        "the critic learns too slowly, returns have another scale, or prompts tell little of the score",
        "a higher ppo.critic_lr, ppo.critic_warmup or ppo.value_clip",
    ),
    Rule(
        "entropy collapse",
        _entropy,
        "the policy has settled on few answers",
        "a higher ppo.kl_coef or ppo.entropy_coef",
    ),
    Rule(
        "length creep",
        _length,
        "the reward prefers long or short responses",
        "look at the samples; reward the length less",
    ),
    Rule(
        "KL blow-up", _kl_large, "the policy leaves the text it was trained on", "a higher ppo.kl_coef, a lower ppo.lr"
    ),
    Rule(
        "KL of impossible sign",
        _kl_sign,
        "policy and reference are not compared on the same tokens",
        "check temperature, masks and that the reference is the SFT model",
    ),
    Rule("ratio outliers", _ratio, "the steps are too large", "a lower ppo.lr, fewer ppo.epochs, ppo.early_stop_kl"),
    Rule("clipping never happens", _never_clipped, "the steps are small", "a higher ppo.lr, or more ppo.epochs"),
    Rule("clipping everywhere", _always_clipped, "the steps are too large", "a lower ppo.lr, or fewer ppo.epochs"),
    Rule(
        "scores without variance",
        _variance,
        "all responses score the same: solved, or nothing to learn from",
        "other prompts, or a reward that tells responses apart",
    ),
    Rule(
        "gold falls while the score grows",
        _gold,
        "the reward model is exploited",
        "early_stop=gold, a higher ppo.kl_coef",
    ),
    Rule("responses repeat", _repeats, "the policy has found one answer that scores well", "a higher ppo.kl_coef"),
    Rule("EOS vanishes", _eos, "responses are cut off", "a stricter missing_eos, or more rollout.max_new_tokens"),
    Rule("gradients at the clip", _gradient, "returns or scores of a large scale", "ppo.score_scaling, a lower ppo.lr"),
)
