"""Tables of the policy's samples over time: prompt, response, score."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from src.modules.ppo import PPOModule
from src.types import Experience


class SampleTable(Callback):
    """Appends the first `rows` samples of every `every`-th iteration to `folder/iteration-N.jsonl`, and to wandb."""

    columns = ("iteration", "prompt", "response", "score", "finished")

    def __init__(self, folder: str, every: int, rows: int) -> None:
        self.folder, self.every, self.rows = Path(folder), every, rows
        self.table: list[list[Any]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: PPOModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Write a few samples of the first, of every `every`-th, and of the last iteration."""
        done = batch_idx + 1
        if not trainer.is_global_zero:
            return
        if done != 1 and done % self.every and done != trainer.num_training_batches:
            return
        experience: Experience = batch["experience"]
        rollout, scores = experience.rollout, experience.scores.tolist()
        finished = rollout.finished.tolist()
        columns = zip(rollout.prompts, rollout.responses, scores, finished, strict=True)
        rows = [[done, *row] for row in list(columns)[: self.rows]]
        self._write(done, rows)
        self.table += rows
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):  # of wandb
                logger.log_table("samples", columns=list(self.columns), data=self.table)

    def on_train_start(self, trainer: Trainer, pl_module: PPOModule) -> None:
        """Write the tables of the checkpoint and delete those that an interrupted run wrote later."""
        by_iteration = {number: list(rows) for number, rows in groupby(self.table, key=lambda row: row[0])}
        for path in self.folder.glob("iteration-*.jsonl"):
            done = path.stem.removeprefix("iteration-")
            if done.isdecimal() and int(done) not in by_iteration:
                path.unlink()
        for number, rows in by_iteration.items():
            self._write(number, rows)

    def _write(self, done: int, rows: list[list[Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(dict(zip(self.columns, row, strict=True)), ensure_ascii=False) for row in rows]
        (self.folder / f"iteration-{done:06d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """The rows of all tables."""
        return {"table": [list(row) for row in self.table]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.table = [list(row) for row in state_dict["table"]]
