"""Variance of the policy gradient with the KL by k1 (kl=reward) and exact (kl=both), on the same rollouts.

python -m studies.kl                                  the embedded task, early, in the middle and at the end
python -m studies.kl --moments 0 10 --batches 64      other moments, narrower intervals

A run of the default KL (k1 as a reward) trains as always; at each moment --batches new batches are sampled from the
policy as it is, and each gives one gradient by k1 and one by the exact KL. Writes kl_variance.json and kl_variance.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from src.callbacks.progress import StageProgress
from src.callbacks.rollout import RolloutCallback, as_prompts
from src.config.compose import compose
from src.config.schema import PPORun
from src.errors import ConfigError, require
from src.modules.ppo import PPOModule
from src.rollout.experience import ExperienceMaker
from src.runs.folder import make_folder, run_folder
from src.runs.prerequisites import train_missing
from src.runs.report import write_json
from src.runs.start import train
from src.stages.ppo import PPOStage
from src.utils.exits import friendly_errors
from src.utils.output import set_up_output
from src.utils.seeding import generator
from src.utils.statistics import Figure, as_result
from studies.estimators.gradients import compare
from studies.kl.gradients import FORMS, PARTS, gradients, scored

Figures = dict[str, dict[str, Figure]]  # "part, form" -> figures
COLUMNS = ("norm", "variance", "noise")


class Moments(Callback):
    """Measures both gradients before the iterations `moments`, on batches of their own; training goes on as without."""

    def __init__(self, maker: ExperienceMaker, seed: int, moments: list[int], batches: int) -> None:
        self.maker, self.seed, self.moments, self.batches = maker, seed, moments, batches
        self.found: dict[int, Figures] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: PPOModule, batch: Any, batch_idx: int) -> None:
        """Measure, if it is a moment."""
        if batch_idx not in self.moments:
            return
        with torch.enable_grad():
            rows = list(self._gradients(trainer, pl_module, batch_idx))
        self.found[batch_idx] = {}
        for part in PARTS:
            stacked = {f"{part}, {form}": torch.stack([row[form, part] for row in rows]) for form in FORMS}
            self.found[batch_idx] |= compare(stacked, f"{part}, k1")

    def _gradients(self, trainer: Trainer, module: PPOModule, moment: int) -> Iterator[dict[tuple[str, str], Tensor]]:
        for number, (fields, _, _) in zip(range(self.batches), trainer.datamodule.train_dataloader(), strict=False):
            draws = generator(self.seed, "kl variance", moment, number)
            rollout = self.maker.sample(module.roles, "policy", as_prompts(fields["prompts"]), moment, draws)
            yield gradients(self.maker, module, scored(self.maker, module, rollout))


def run_study(overrides: list[str], moments: list[int], batches: int) -> dict[int, Figures]:
    """Train as the overrides say and measure at the moments."""
    run = compose(["stage=ppo", *overrides])
    assert isinstance(run, PPORun)
    if run.trainer.strategy is not None:
        raise ConfigError("trainer=ddp: the study computes its gradients in one process; leave it out")
    last = run.ppo.num_iterations - 1
    for moment in moments:
        require(0 <= moment <= last, "--moments", moment, f"from 0 to {last}, an iteration of the run")
    require(batches <= run.ppo.num_iterations, "--batches", batches, "at most ppo.num_iterations")
    folder = run_folder(Path(run.log_dir) / "kl", run.name, overrides, "never")
    stage = PPOStage(run.model_copy(update={"run_dir": str(folder)}))
    if stage.value_loss is None or stage.run.ppo.kl_in != "reward":
        raise ConfigError("the study compares with kl=reward and needs a critic: leave kl and advantage as they are")
    stage.check()
    stage.set_paths(**train_missing(run, train))
    make_folder(folder)
    module, data = stage.build(stage.corpus(), folder)
    recorder = Moments(stage.maker, run.seed, moments, batches)
    callbacks = [recorder, RolloutCallback(stage.maker, run.seed), StageProgress(stage.unit)]
    stage.trainer(callbacks, folder).fit(module, datamodule=data)
    write(folder, recorder.found)
    return recorder.found


def write(folder: Path, found: dict[int, Figures]) -> None:
    """Write and print the table."""
    write_json(
        folder / "kl_variance.json",
        {str(moment): {name: as_result(f) for name, f in rows.items()} for moment, rows in found.items()},
    )
    text = markdown(found)
    (folder / "kl_variance.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{folder}: kl_variance.md, kl_variance.json")


def markdown(found: dict[int, Figures]) -> str:
    """One row per moment, part and form."""
    lines = ["| before iteration | gradient | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for moment, rows in found.items():
        for name, figures in rows.items():
            cells = " | ".join(f"{figures[column]:.3g}" for column in COLUMNS)
            lines.append(f"| {moment + 1} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value or group=option, as for python -m src.train")
    parser.add_argument("--moments", type=int, nargs="+", default=[10, 25, 49], help="iterations, counted from 0")
    parser.add_argument("--batches", type=int, default=32, help="batches to compute gradients from, at least 3")
    arguments = parser.parse_intermixed_args()
    set_up_output()
    with friendly_errors(arguments.overrides):
        require(arguments.batches >= 3, "--batches", arguments.batches, "at least 3")
        run_study(arguments.overrides, arguments.moments, arguments.batches)


if __name__ == "__main__":
    main()
