"""Tables of the policy's samples over time, with the numbers of their tokens, and of the final comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from src.callbacks.token_numbers import token_numbers
from src.modules.ppo import PPOModule
from src.rollout.evaluation import Answers, merge
from src.types import Experience, select
from src.utils.exits import attempt
from src.utils.nonfinite import json_number
from src.utils.phases import phase

COMPARISON = "comparison.jsonl"
HISTOGRAMS = ("ratio", "advantage")


class SampleTable(Callback):
    """Writes the first `rows` samples of every `every`-th iteration to `folder/iteration-N.jsonl`, and to loggers.

    A line is a sample: iteration, prompt, response, score, finished, and `tokens`, the numbers of its tokens.
    """

    columns = ("iteration", "prompt", "response", "score", "finished")

    def __init__(self, folder: str, every: int, rows: int) -> None:
        self.folder, self.every, self.rows = Path(folder), every, rows
        self.tables: dict[int, str] = {}  # iteration -> content of its file

    @phase("saving")
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: PPOModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Write a few samples of the first, of every `every`-th, and of the last iteration."""
        done = batch_idx + 1
        if done != 1 and done % self.every and done != trainer.num_training_batches:
            return
        whole: Experience = batch["experience"]
        experience = select(whole, torch.arange(min(self.rows, len(whole)), device=whole.scores.device))
        with phase("measuring"), trainer.precision_plugin.forward_context():
            tokens = token_numbers(pl_module, experience)  # on every rank: its passes may need all of them
        if not trainer.is_global_zero:
            return
        rollout = experience.rollout
        columns = (rollout.prompts, rollout.responses, experience.scores.tolist(), rollout.finished.tolist(), tokens)
        samples = [
            dict(zip((*self.columns, "tokens"), (done, *row), strict=True)) for row in zip(*columns, strict=True)
        ]
        self.tables[done] = lines(samples)
        self._write(done)
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table("samples", columns=list(self.columns), data=self._rows())
            if hasattr(logger, "log_histograms"):
                logger.log_histograms(_distributions(tokens), done)

    def on_train_start(self, trainer: Trainer, pl_module: PPOModule) -> None:
        """Write the tables of the checkpoint and delete those that an interrupted run wrote later."""
        if not trainer.is_global_zero:
            return
        for path in self.folder.glob("iteration-*.jsonl"):
            done = path.stem.removeprefix("iteration-")
            if done.isdecimal() and int(done) not in self.tables:
                path.unlink()
        for number in self.tables:
            self._write(number)

    def _write(self, done: int) -> None:
        """Write a table, which a checkpoint keeps too: a full disk does not end the run here."""
        file = self.folder / f"iteration-{done:06d}.jsonl"
        attempt(str(file), lambda: self._put(file, self.tables[done]))

    def _put(self, file: Path, content: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")

    def _rows(self) -> list[list[Any]]:
        """All samples without the numbers of their tokens."""
        samples = [json.loads(line) for table in self.tables.values() for line in table.split("\n") if line]
        return [[sample[column] for column in self.columns] for sample in samples]

    def state_dict(self) -> dict[str, Any]:
        """The content of all tables."""
        return {"tables": dict(self.tables)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.tables = dict(state_dict["tables"])


def _distributions(tokens: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Ratio and advantage of every token of the samples, where there are any."""
    found = {name: [x for row in tokens for x in row.get(name, ()) if x is not None] for name in HISTOGRAMS}
    return {f"samples/{name}": values for name, values in found.items() if values}


class ComparisonTable(Callback):
    """Writes the answers of the final comparison to `comparison.jsonl`: a line per prompt, with both responses.

    Loggers get the same as a table: prompt, response and score before (`sft`) and after (`ppo`).
    """

    columns = ("prompt", "sft", "sft score", "ppo", "ppo score")

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_test_end(self, trainer: Trainer, pl_module: PPOModule) -> None:
        """Write them, with the measures of each."""
        if not trainer.is_global_zero:
            return
        whole = merge(pl_module.evaluations)
        before, after = _answers(whole.reference), _answers(whole.policy)
        both = zip(before, after, strict=True)
        rows = [{"prompt": prompt, "sft": sft, "ppo": ppo} for (prompt, sft), (_, ppo) in both]
        (self.folder / COMPARISON).write_text(lines(rows), encoding="utf-8")
        attempt("the comparison on the boards", lambda: self._log(trainer, rows))

    def _log(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        cells = [(role, name) for role in ("sft", "ppo") for name in ("response", "score")]
        data = [[row["prompt"], *(row[role].get(name) for role, name in cells)] for row in rows]
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table("comparison", columns=list(self.columns), data=data)


def lines(rows: list[dict[str, Any]]) -> str:
    """A JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _answers(answers: Answers) -> list[tuple[str, dict[str, Any]]]:
    """Each prompt with the response to it and its measures."""
    measures = [dict(zip(answers.measures, row, strict=True)) for row in zip(*answers.measures.values(), strict=True)]
    return [
        (prompt, {"response": response} | {name: json_number(value) for name, value in row.items()})
        for prompt, response, row in zip(answers.prompts, answers.responses, measures, strict=True)
    ]
