"""One process of this project: `python -m benchmarks.compare.ours FOLDER [OVERRIDE ...]` runs `src.train`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.compare.workload import Clock, Workload
from src.callbacks.rollout import RolloutCallback
from src.config.compose import compose
from src.modules.ppo import PPOModule
from src.runs.start import train
from src.utils.output import set_up_output


class PhaseClock(Callback):
    """Times the phases; it comes after the rollout callback, so its hook runs when the experience is made."""

    make_clock: Callable[[], Any] = Clock

    def on_train_start(self, trainer: Trainer, pl_module: PPOModule) -> None:
        """Start the clock, and hook into the sampler and the optimizers."""
        self.clock = self.make_clock(pl_module.device.type)
        maker = next(c.maker for c in trainer.callbacks if isinstance(c, RolloutCallback))
        draw = maker.draw

        def timed(*arguments: Any) -> Any:
            rollout = draw(*arguments)
            self.clock.lap("rollout")
            return rollout

        maker.draw = timed  # type: ignore[method-assign]
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.clock.steps += 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: PPOModule, batch: Any, batch_idx: int) -> None:
        """End the scoring phase."""
        self.clock.lap("score")

    def on_train_batch_end(self, trainer: Trainer, pl_module: PPOModule, outputs: Any, batch: Any, _: int) -> None:
        """End the training phase and the iteration."""
        self.clock.lap("train")
        self.clock.finish(int(batch["experience"].mask.sum()))


def overrides(workload: Workload, folder: Path) -> list[str]:
    """The workload as overrides of the command line."""
    return [
        *"experiment=none data=custom data.columns.prompt=prompt model=gpt2 gold_reward=none resume=never".split(),
        *(f"data.path={folder}/train.jsonl", f"model.path={folder}/policy"),
        f"trainer.accelerator={'gpu' if workload.device == 'cuda' else 'cpu'}",
        *(f"data.splits.{split}={folder}/{split}.jsonl" for split in ("validation", "test")),
        *("model.lora.targets=[c_attn]", f"model.lora.rank={workload.rank}", f"model.lora.alpha={2 * workload.rank}"),
        *("reward=learned", f"reward.path={folder}/reward", f"reward.batch_size={workload.rows // 2}"),
        *(f"ppo.num_iterations={workload.iterations}", f"ppo.epochs={workload.epochs}"),
        f"ppo.batch_size={workload.rows}",
        *(f"ppo.minibatch_size={workload.minibatch}", f"ppo.micro_batch_size={workload.minibatch}", "ppo.lr=1e-5"),
        *("ppo.eval_prompts=1", f"rollout.scoring_batch_size={workload.rows // 2}"),
        *(f"rollout.max_prompt_tokens={workload.longest}", f"rollout.max_new_tokens={workload.new_tokens}"),
        "+callbacks.clock._target_=benchmarks.compare.ours.PhaseClock",
    ]


def main() -> None:
    """Entry of the command line."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    given = [override.replace("FOLDER", str(folder)) for override in sys.argv[2:]]
    chosen = {override.partition("=")[0] for override in given}
    plain = [o for o in overrides(Workload.read(folder), folder) if o.partition("=")[0] not in chosen]
    if "model.lora" in chosen:
        plain = [override for override in plain if not override.startswith("model.lora.")]
    with tempfile.TemporaryDirectory(dir=folder) as run:
        config = compose([*plain, *given, f"log_dir={run}"])
        set_up_output()
        train(config.model_copy(update={"run_dir": f"{run}/run"}))


if __name__ == "__main__":
    main()
