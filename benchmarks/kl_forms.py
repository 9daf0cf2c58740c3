"""The KL sampled by k1 as a reward (kl=reward) and exact (kl=both) on the embedded task: gold against KL.

    python -m benchmarks.kl_forms --seeds 1 2 3 4 5

Both runs of a seed share its SFT policy and its reward model. Writes benchmarks/results/kl_forms.json and kl_forms.md,
and docs/kl_forms.png: gold against the KL on held-out prompts, every five iterations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture

from benchmarks.seeds import RESULTS, cell, newest_result
from src.loggers.csv import read_table

FORMS = {"kl=reward": ("k1, as a reward", "tab:blue"), "kl=both": ("exact, as a reward and in the loss", "tab:orange")}
SHARED = ("ppo.held_out.every=5", "ppo.held_out.prompts=64", "resume=never")
ROWS = (
    ("gold, SFT policy", "sft", "gold"),
    ("gold, PPO policy", "ppo", "gold"),
    ("score, PPO policy", "ppo", "score"),
    ("KL to the reference (nats per sequence)", "ppo", "kl"),
    ("grammatical sentences, PPO policy", "ppo", "grammatical"),
)
PICTURE = Path("docs/kl_forms.png")


def run(form: str, seed: int) -> Path:
    """One training run in a separate process; returns its folder."""
    name = f"kl-forms-{form.partition('=')[2]}-{seed}"
    command = [sys.executable, "-m", "src.train", form, *SHARED, f"seed={seed}", f"name={name}"]
    subprocess.run(command, check=True)
    return newest_result(Path("logs/ppo"), name).parent


def read(folder: Path) -> dict[str, Any]:
    """The result of a run, and its `curve`: (KL, gold) of held-out prompts while it trained."""
    rows = [row for _, row in sorted(read_table(folder / "metrics.csv").items()) if "held_out/kl" in row]
    curve = [(row["held_out/kl"], row["held_out/gold"]) for row in rows]
    return json.loads((folder / "result.json").read_text(encoding="utf-8")) | {"curve": curve}


def table(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Rows of figures for each form, one column per seed."""
    seeds = list(next(iter(results.values())))
    lines = ["| | | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---" * (len(seeds) + 2) + "|"]
    for title, group, name in ROWS:
        for form, by_seed in results.items():
            cells = [cell(result, group, name) for result in by_seed.values()]
            lines.append(f"| {title} | `{form}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Gold against KL: one line per run, a cross where it ended."""
    picture = Picture(figsize=(6.5, 4.2), layout="constrained")
    axis = picture.subplots()
    for form, by_seed in results.items():
        label, color = FORMS[form]
        for number, result in enumerate(by_seed.values()):
            kl, gold = zip(*result["curve"], strict=True)
            axis.plot(kl, gold, color=color, linewidth=1, alpha=0.6, label=None if number else f"{form}: {label}")
            axis.plot(result["ppo"]["kl"], result["ppo"]["gold"], "x", color=color, markersize=8)
    axis.set_title(f"gold on held-out prompts, {len(by_seed)} seeds each; x: the end", fontsize="medium")
    axis.set_xlabel("KL to the reference (nats per sequence)")
    axis.set_ylabel("gold score (VADER)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    picture.savefig(PICTURE, dpi=110)


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    seeds = parser.parse_args().seeds
    by_seed = {seed: {form: read(run(form, seed)) for form in FORMS} for seed in seeds}
    results = {form: {seed: by_seed[seed][form] for seed in seeds} for form in FORMS}
    (RESULTS / "kl_forms.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "kl_forms.md").write_text(table(results), encoding="utf-8")
    draw(results)
    print(table(results))


if __name__ == "__main__":
    main()
