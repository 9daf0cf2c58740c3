"""Draw docs/gold_and_proxy.png from the committed results: what PPO does to proxy and gold.

    python -m benchmarks.pictures

Left: benchmarks/results/sentiment.json, the embedded default, before and after PPO, on held-out prompts. Right:
benchmarks/results/overoptimization.json, a weak reward model without a KL penalty, over the iterations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "gold_and_proxy.png"
COLORS = {"proxy": "tab:orange", "gold": "tab:blue"}
LAST = 160  # iterations of experiment=overoptimization


def read(name: str) -> dict[str, Any]:
    """Figures by seed."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def draw_default(axis: Axes, runs: dict[str, Any]) -> None:
    """Proxy and gold of the SFT and the PPO policy, one line per seed, with 95% intervals."""
    for name, key, label in (("proxy", "score", "proxy: reward model"), ("gold", "gold", "gold: VADER")):
        for number, result in enumerate(runs.values()):
            means = [result[policy][key] for policy in ("sft", "ppo")]
            low, high = zip(*(result[policy]["interval"][key] for policy in ("sft", "ppo")), strict=True)
            bars = [[abs(m - e) for m, e in zip(means, ends, strict=True)] for ends in (low, high)]
            shift = 0.025 * (number - (len(runs) - 1) / 2)  # so that the intervals do not cover one another
            axis.errorbar([shift, 1 + shift], means, bars, label=None if number else label, **style(name, 0))
    axis.set_xticks([0, 1], ["SFT policy", "PPO policy"])
    axis.set_xlim(-0.3, 1.3)
    axis.set_title(f"good reward model, KL penalty ({len(runs)} seeds)", fontsize="medium")


def draw_too_far(axis: Axes, runs: dict[str, Any]) -> None:
    """Gold at the start, at its highest and at the end, and the proxy at the latter two, one line style per seed."""
    for number, found in enumerate(runs.values()):
        top, labels = found["highest_at"], ("gold: mood and grammar", "proxy: reward model")
        gold, proxy = [found["start"], found["highest"], found["last"]], [found["score_there"], found["score_last"]]
        axis.plot([0, top, LAST], gold, label=None if number else labels[0], **style("gold", number))
        axis.plot([top, LAST], proxy, label=None if number else labels[1], **style("proxy", number))
    axis.set_xlabel("iteration")
    axis.set_title(f"weak reward model, no KL penalty ({len(runs)} seeds)", fontsize="medium")


def style(name: str, seed: int) -> dict[str, Any]:
    """Color by what is measured, line style by seed."""
    return {
        "color": COLORS[name],
        "linestyle": ("-", "--", ":")[seed % 3],
        "marker": "o",
        "markersize": 4,
        "linewidth": 1.2,
    }


def main() -> None:
    """Draw and save."""
    picture = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    draw_default(left, read("sentiment"))
    draw_too_far(right, read("overoptimization"))
    for axis in (left, right):
        axis.set_ylabel("mean score of the responses")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="best")
    picture.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
