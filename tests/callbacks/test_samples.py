"""The tables of samples: which iterations, which rows, and what a resumed run makes of them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.callbacks import samples
from src.callbacks.samples import ComparisonTable, SampleTable
from src.rollout.evaluation import Answers, Evaluation
from tests.tiny import ragged_experience, ragged_rollout

ITERATIONS = 7


@pytest.fixture(autouse=True)
def scores_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of the tokens has its own tests (test_token_numbers.py)."""
    monkeypatch.setattr(samples, "token_numbers", lambda _, rows: [{"kl": [s]} for s in rows.scores.tolist()])


class Tables:
    """A logger that takes tables, as Weights & Biases does."""

    def __init__(self) -> None:
        self.name, self.rows = "", list[Any]()

    def log_table(self, name: str, columns: list[str], data: list[list[Any]]) -> None:
        self.name = name
        self.rows = [dict(zip(columns, row, strict=True)) for row in data]


def trainer(*loggers: Any, main: bool = True) -> Any:
    plugin = SimpleNamespace(forward_context=nullcontext)
    return SimpleNamespace(
        is_global_zero=main, num_training_batches=ITERATIONS, loggers=[object(), *loggers], precision_plugin=plugin
    )


def go(table: SampleTable, trainer: Any, first: int = 1, last: int = ITERATIONS) -> None:
    """The iterations of a run from `first` on, each with another experience."""
    table.on_train_start(trainer, SimpleNamespace())  # type: ignore[arg-type]
    for done in range(first, last + 1):
        rollout, zeros = ragged_rollout(rows=4, seed=done), torch.zeros(4, 6)
        batch = {"experience": ragged_experience(rollout, zeros, zeros, seed=done)}
        table.on_train_batch_end(trainer, SimpleNamespace(), None, batch, done - 1)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*"))}


@pytest.mark.parametrize(("every", "kept"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6, 7]), (20, [1, 7])])
def test_the_first_every_so_many_and_the_last_are_written(every: int, kept: list[int], tmp_path: Path) -> None:
    wandb = Tables()
    go(SampleTable(str(tmp_path), every, rows=3), trainer(wandb))
    assert list(files(tmp_path)) == [f"iteration-{done:06d}" for done in kept]
    experience = ragged_experience(ragged_rollout(rows=4, seed=7), torch.zeros(4, 6), torch.zeros(4, 6), seed=7)
    rows = [json.loads(line) for line in files(tmp_path)["iteration-000007"].splitlines()]
    expected = [
        {"iteration": 7, "prompt": f"p{i}", "response": f"r{i}", "score": experience.scores[i].item(),
         "finished": i % 2 == 0} for i in range(3)
    ]  # fmt: skip
    assert rows == [row | {"tokens": {"kl": [row["score"]]}} for row in expected]
    assert [row["iteration"] for row in wandb.rows] == [done for done in kept for _ in range(3)]
    assert wandb.rows[-3:] == expected


def test_a_resumed_run_has_the_tables_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """What was written after the checkpoint is gone before the run comes to it again."""
    go(SampleTable(str(tmp_path / "whole"), 2, rows=3), trainer())
    first, again = SampleTable(str(tmp_path / "cut"), 2, rows=3), SampleTable(str(tmp_path / "cut"), 2, rows=3)
    go(first, trainer(), last=3)
    torch.save(first.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    go(first, trainer(), first=4, last=6)
    again.load_state_dict(state)
    go(again, trainer(), first=4, last=5)
    assert list(files(tmp_path / "cut")) == [f"iteration-{done:06d}" for done in (1, 2, 4)]
    go(again, trainer(), first=6)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_files_of_other_names_stay(tmp_path: Path) -> None:
    """A resumed run deletes its own later tables alone."""
    for name in ("iteration-x.jsonl", "iteration-3 (copy).jsonl", "iteration-000009.jsonl"):
        (tmp_path / name).touch()
    SampleTable(str(tmp_path), 1, rows=3).on_train_start(trainer(), SimpleNamespace())  # type: ignore[arg-type]
    assert set(files(tmp_path)) == {"iteration-x", "iteration-3 (copy)"}


def test_one_rank_deletes_and_writes(tmp_path: Path) -> None:
    later = tmp_path / "iteration-000009.jsonl"
    later.touch()
    table = SampleTable(str(tmp_path), 1, rows=3)
    table.tables = {1: ""}
    table.on_train_start(trainer(main=False), SimpleNamespace())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [later]


def test_one_rank_writes(tmp_path: Path) -> None:
    go(SampleTable(str(tmp_path / "samples"), 1, 3), trainer(main=False))
    assert not (tmp_path / "samples").exists()


def test_the_final_comparison_is_a_line_per_prompt(tmp_path: Path) -> None:
    """Of two batches; what the reward could not score in one role is in neither."""
    nan = float("nan")

    def answers(first: int, word: str, scores: list[float]) -> Answers:
        texts = tuple(f"{word}{first + i}" for i in range(len(scores)))
        prompts = tuple(f"p{first + i}" for i in range(len(scores)))
        return Answers(prompts, texts, {"score": scores, "kl": [0.5] * len(scores)})

    parts = [
        Evaluation(answers(0, "a", [1.0, 2.0]), answers(0, "b", [3.0, nan])),
        Evaluation(answers(2, "a", [4.0]), answers(2, "b", [5.0])),
    ]
    for main, name in ((True, "first"), (False, "other")):
        (tmp_path / name).mkdir()
        wandb, module = Tables(), SimpleNamespace(evaluations=parts)
        ComparisonTable(str(tmp_path / name)).on_test_end(trainer(wandb, main=main), module)  # type: ignore[arg-type]
        assert wandb.name == ("comparison" if main else "")
        assert wandb.rows[2:] == (
            [{"prompt": "p2", "sft": "a2", "sft score": 4.0, "ppo": "b2", "ppo score": 5.0}] if main else []
        )
    rows = [json.loads(line) for line in (tmp_path / "first" / "comparison.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["sft"]["response"], row["ppo"]["response"]) for row in rows] == [
        ("p0", "a0", "b0"), ("p1", "a1", "b1"), ("p2", "a2", "b2"),
    ]  # fmt: skip
    assert [(row["sft"]["score"], row["ppo"]["score"]) for row in rows] == [(1.0, 3.0), ("nan", "nan"), (4.0, 5.0)]
    assert rows[2]["ppo"]["kl"] == 0.5
    assert not (tmp_path / "other" / "comparison.jsonl").exists()


def test_a_line_is_a_sample_whatever_is_in_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters at which Python splits lines and JSON does not: U+2028, U+2029, U+0085."""
    text, wandb = "a\u2028b\u2029c\u0085d", Tables()
    monkeypatch.setattr(samples, "select", lambda whole, rows: replace(whole, rollout=odd(whole.rollout)))

    def odd(rollout: Any) -> Any:
        return replace(rollout, responses=tuple(text for _ in rollout.responses))

    go(SampleTable(str(tmp_path), every=3, rows=4), trainer(wandb), last=3)
    assert [row["response"] for row in wandb.rows] == [text] * 8
