"""Compare the policy gradients of all advantage estimators on the same rollouts.

python -m studies.estimators                                    the embedded task, scored by VADER
python -m studies.estimators reward=learned ppo.batch_size=128  another reward, larger batches
python -m studies.estimators --warmup 40 --batches 64           a better critic, narrower intervals

The policy stays the SFT policy; only a critic learns, for --warmup iterations. Then each of --batches new batches gives
one gradient per estimator. This is done twice: with the reward at the end of the response, and with each token's own
gain in reward. Writes estimators.json, estimators.md and estimators.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture
from rich.console import Console
from rich.table import Table

from src.callbacks.progress import StageProgress
from src.callbacks.rollout import RolloutCallback
from src.config.compose import compose
from src.config.files import options
from src.config.schema import Loggers, PPORun
from src.errors import ConfigError, require
from src.runs.folder import make_folder, run_folder
from src.runs.prerequisites import train_missing
from src.runs.report import write_json
from src.runs.start import train
from src.stages.objects import instantiate
from src.stages.ppo import PPOStage
from src.utils.exits import friendly_errors
from src.utils.output import set_up_output
from src.utils.statistics import Figure, as_result
from studies.estimators.callback import GradientRecorder
from studies.estimators.gradients import EveryEstimator, compare
from studies.estimators.prefix_reward import PrefixGain

# the plain policy gradient: no KL, no whitening, a sum over each response; several samples for the group estimators
PLAIN = (
    "stage=ppo reward=vader kl=none missing_eos=none aggregation=constant_length rollout.samples_per_prompt=4 "
    "ppo.whiten_advantages=false ppo.critic_lam=1.0 ppo.critic_lr=2.0e-3"
).split()
TRUTH = "reward_to_go"  # unbiased, and needs rewards only
ROAD = ("total_return", "reward_to_go", "baseline_batch", "baseline_running", "baseline_value", "td", "gae")
COLUMNS = ("norm", "variance", "noise", "cosine")


def run_study(overrides: list[str], warmup: int, batches: int) -> dict[str, dict[str, dict[str, Figure]]]:
    """Both halves of the study: reward placement -> estimator -> figures."""
    run = compose([*PLAIN, *overrides, f"ppo.num_iterations={warmup + batches}", "ppo.critic_warmup=0"])
    assert isinstance(run, PPORun)  # PLAIN chooses the stage
    if run.trainer.strategy is not None:
        raise ConfigError("trainer=ddp: the study computes its gradients in one process; leave it out")
    require(run.rollout.samples_per_prompt >= 2, "rollout.samples_per_prompt", 1, "at least 2 for the group estimators")
    folder = run_folder(Path(run.log_dir) / "estimators", run.name, overrides, "never")
    # only the critic learns: a value that the configuration refuses for a training run
    frozen = run.ppo.model_copy(update={"critic_warmup": run.ppo.num_iterations})
    stage = PPOStage(run.model_copy(update={"run_dir": str(folder), "ppo": frozen, "logger": Loggers()}))
    stage.check()
    stage.set_paths(**train_missing(run, train))
    make_folder(folder)
    found = {"terminal": measure(stage, folder, warmup, dense=False)}
    found |= {"per token": measure(PPOStage(stage.run), folder, warmup, dense=True)}
    write(folder, found)
    return found


def measure(stage: PPOStage, folder: Path, warmup: int, *, dense: bool) -> dict[str, dict[str, Figure]]:
    """Let the critic learn, then compare the gradients of all estimators."""
    module, data = stage.build(stage.corpus(), folder)
    if dense:
        module.reward = PrefixGain(module.reward, data.tokenizer)
    estimator = EveryEstimator(stage.maker.advantage, estimators())
    stage.maker.advantage = estimator
    recorder = GradientRecorder(estimator, warmup)
    trainer = stage.trainer([RolloutCallback(stage.maker, stage.run.seed), recorder, StageProgress(stage.unit)], folder)
    trainer.fit(module, datamodule=data)
    return compare(recorder.stacked(), TRUTH)


def estimators() -> dict[str, Any]:
    """Every option of the group `advantage`: first those from the total return to GAE."""
    names = [*ROAD, *(name for name in options("advantage") if name not in ROAD)]
    runs = {name: compose([f"advantage={name}", "rollout.samples_per_prompt=4"]) for name in names}
    return {
        name: instantiate(run.ppo.advantage, "ppo.advantage") for name, run in runs.items() if isinstance(run, PPORun)
    }


def write(folder: Path, found: dict[str, dict[str, dict[str, Figure]]]) -> None:
    """Write and print the tables, draw the picture."""
    write_json(folder / "estimators.json", {w: {n: as_result(f) for n, f in rows.items()} for w, rows in found.items()})
    (folder / "estimators.md").write_text(
        "\n\n".join(f"### Reward: {where}\n\n{markdown(rows)}" for where, rows in found.items()) + "\n",
        encoding="utf-8",
    )
    draw(found, folder / "estimators.png")
    for where, rows in found.items():
        table = Table("Phi_t", *COLUMNS, title=f"reward: {where}")
        for name, figures in rows.items():
            table.add_row(name, *(f"{figures[column]:.3g}" for column in COLUMNS))
        Console().print(table)
    print(f"{folder}: estimators.md, estimators.json, estimators.png")


def markdown(rows: dict[str, dict[str, Figure]]) -> str:
    """One row per estimator."""
    lines = ["| Phi_t | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{f[column]:.3g}" for column in COLUMNS) + " |" for name, f in rows.items()]
    return "\n".join(lines)


def draw(found: dict[str, dict[str, dict[str, Figure]]], path: Path) -> None:
    """Noise and cosine of each estimator, from 0, one row of panels per reward placement; lines are 95% intervals."""
    picture = Picture(figsize=(11, 3.2 * len(found)), layout="constrained")
    axes = picture.subplots(len(found), 2, squeeze=False)
    titles = {"noise": "noise: variance / norm^2", "cosine": "cosine to the mean of other batches"}
    for row, (where, rows) in zip(axes, found.items(), strict=True):
        for axis, (column, title) in zip(row, titles.items(), strict=True):
            shown = {name: figures[column] for name, figures in rows.items()}
            axis.barh(list(shown), [figure.value for figure in shown.values()], color="tab:blue", alpha=0.7)
            for name, figure in shown.items():
                axis.plot(figure.interval or (), [name] * len(figure.interval or ()), color="black", linewidth=1.2)
            axis.invert_yaxis()  # in the order of the table
            axis.set_title(f"{title}; reward: {where}", fontsize="medium")
            axis.grid(axis="x", alpha=0.3)
    picture.savefig(path, dpi=100)


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value or group=option, as for python -m src.train")
    parser.add_argument("--warmup", type=int, default=30, help="iterations in which only the critic learns")
    parser.add_argument("--batches", type=int, default=32, help="batches to compute gradients from, at least 3")
    arguments = parser.parse_intermixed_args()
    set_up_output()
    with friendly_errors(arguments.overrides):
        require(arguments.warmup >= 0, "--warmup", arguments.warmup, "at least 0")
        require(arguments.batches >= 3, "--batches", arguments.batches, "at least 3")
        run_study(arguments.overrides, arguments.warmup, arguments.batches)


if __name__ == "__main__":
    main()
