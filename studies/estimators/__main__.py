"""The ladder: every Phi_t on the same rollouts, and what it does to the policy gradient.

python -m studies.estimators                                    the embedded task, scored by VADER
python -m studies.estimators reward=learned ppo.batch_size=128  another reward, larger batches
python -m studies.estimators --warmup 40 --batches 64           a better critic, narrower intervals

The policy stays where SFT left it; only a critic learns, for --warmup iterations. Then the gradient of every estimator
is taken from each of --batches fresh batches: twice, once with the reward at the end of the response, once with each
token's own gain of it. Writes ladder.json, ladder.md and ladder.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from matplotlib.figure import Figure as Picture
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from src.callbacks.rollout import RolloutCallback
from src.config.compose import compose, instantiate
from src.config.errors import CONF
from src.config.validate import preflight
from src.errors import ConfigError, require
from src.runs.folder import make_folder, run_folder
from src.runs.prerequisites import ensure
from src.runs.report import friendly_errors, quiet_libraries, write_json
from src.train import train
from src.utils.statistics import Figure, as_result
from studies.estimators.callback import GradientRecorder
from studies.estimators.gradients import EveryEstimator, compare
from studies.estimators.prefix_reward import PrefixGain

# the theory in its plain form: no KL, no whitening, a sum over each response; several samples for the group estimators
PLAIN = (
    "stage=ppo reward=vader kl=none missing_eos=none aggregation=constant_length rollout.samples_per_prompt=4 "
    "ppo.whiten_advantages=false ppo.critic_lam=1.0 ppo.critic_lr=2.0e-3"
).split()
TRUTH = "reward_to_go"  # unbiased, and needs nothing but rewards
ROAD = ("total_return", "reward_to_go", "baseline_batch", "baseline_running", "baseline_value", "td", "gae")
COLUMNS = ("norm", "variance", "noise", "cosine")


def climb(overrides: list[str], warmup: int, batches: int) -> dict[str, dict[str, dict[str, Figure]]]:
    """Both halves of the ladder: reward placement -> estimator -> figures."""
    config = compose([*PLAIN, *overrides, f"ppo.num_iterations={warmup + batches}", "ppo.critic_warmup=0"])
    config.run_dir = str(run_folder(Path(config.log_dir) / "ladder", config.name, overrides, "never"))
    preflight(config)
    config.ppo.critic_warmup = config.ppo.num_iterations  # the policy stays: what no run that learns may ask for
    if "strategy" in config.trainer:
        raise ConfigError("trainer=ddp: the ladder takes its gradients in one process; leave it out")
    require(
        config.rollout.samples_per_prompt >= 2, "rollout.samples_per_prompt", 1, "at least 2 for the group estimators"
    )
    ensure(config, train)
    make_folder(Path(config.run_dir))
    found = {"terminal": measure(config, warmup, dense=False), "per token": measure(config, warmup, dense=True)}
    write(Path(config.run_dir), found)
    return found


def measure(config: DictConfig, warmup: int, *, dense: bool) -> dict[str, dict[str, Figure]]:
    """Let the critic learn, then compare the gradients of all estimators."""
    corpus = instantiate(config.data)
    tokenizer = instantiate(config.tokenizer)(corpus=corpus)
    module = instantiate(config.module)(tokenizer=tokenizer)
    if dense:
        module.reward = PrefixGain(module.reward, tokenizer)
    maker = instantiate(config.checks.maker)
    maker.advantage = EveryEstimator(maker.advantage, estimators())
    ladder = GradientRecorder(maker.advantage, warmup)
    trainer: Trainer = instantiate(config.trainer)(
        callbacks=[RolloutCallback(maker, config.seed), ladder, instantiate(config.callbacks.progress)], logger=False
    )
    trainer.fit(module, datamodule=instantiate(config.datamodule)(corpus=corpus, tokenizer=tokenizer))
    return compare(ladder.stacked(), TRUTH)


def estimators() -> dict[str, Any]:
    """Every option of the group `advantage`, first those on the road from the total return to GAE."""
    names = sorted(path.stem for path in (CONF / "advantage").glob("*.yaml"))
    names = [*ROAD, *(name for name in names if name not in ROAD)]
    return {name: instantiate(compose([f"advantage={name}"]).ppo.advantage) for name in names}


def write(folder: Path, found: dict[str, dict[str, dict[str, Figure]]]) -> None:
    """Table and picture, and where they are."""
    write_json(folder / "ladder.json", {w: {n: as_result(f) for n, f in rows.items()} for w, rows in found.items()})
    (folder / "ladder.md").write_text(
        "\n\n".join(f"### Reward: {where}\n\n{markdown(rows)}" for where, rows in found.items()) + "\n",
        encoding="utf-8",
    )
    draw(found, folder / "ladder.png")
    for where, rows in found.items():
        table = Table("Phi_t", *COLUMNS, title=f"reward: {where}")
        for name, figures in rows.items():
            table.add_row(name, *(f"{figures[column]:.3g}" for column in COLUMNS))
        Console().print(table)
    print(f"{folder}: ladder.md, ladder.json, ladder.png")


def markdown(rows: dict[str, dict[str, Figure]]) -> str:
    """One row per estimator."""
    lines = ["| Phi_t | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{f[column]:.3g}" for column in COLUMNS) + " |" for name, f in rows.items()]
    return "\n".join(lines)


def draw(found: dict[str, dict[str, dict[str, Figure]]], path: Path) -> None:
    """Noise and cosine of each estimator, one row of panels per reward placement."""
    picture = Picture(figsize=(11, 3.2 * len(found)), layout="constrained")
    axes = picture.subplots(len(found), 2, squeeze=False)
    for row, (where, rows) in zip(axes, found.items(), strict=True):
        for axis, column, title in zip(
            row, ("noise", "cosine"), ("variance / |mean|^2", "cosine to the large-batch gradient"), strict=True
        ):
            axis.barh(list(rows), [figures[column].value for figures in rows.values()])
            axis.set_title(f"{title}; reward: {where}", fontsize="medium")
            axis.grid(axis="x", alpha=0.3)
            axis.set_xscale("log" if column == "noise" else "linear")
    picture.savefig(path, dpi=100)


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value or group=option, as for python -m src.train")
    parser.add_argument("--warmup", type=int, default=30, help="iterations in which only the critic learns")
    parser.add_argument("--batches", type=int, default=32, help="batches whose gradients are taken, at least 3")
    arguments = parser.parse_intermixed_args()
    quiet_libraries()
    with friendly_errors(arguments.overrides):
        require(arguments.warmup >= 0, "--warmup", arguments.warmup, "at least 0")
        require(arguments.batches >= 3, "--batches", arguments.batches, "at least 3")
        climb(arguments.overrides, arguments.warmup, arguments.batches)


if __name__ == "__main__":
    main()
