"""The progress bar: one line of 80 columns that names the stage's unit and its main numbers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import Task

from src.callbacks.progress import RateColumn, StageProgress
from src.callbacks.rollout import RolloutCallback
from src.data.modules import PromptData
from tests.tiny import FOREIGN_WARNINGS, Recorder, TinyCorpus, make_maker, make_module, make_roles, tokenizer, write_lm

pytestmark = FOREIGN_WARNINGS


class Frames(Callback):
    """What the bar shows after each iteration, as a terminal of 80 columns would."""

    def __init__(self, bar: StageProgress) -> None:
        self.bar, self.frames = bar, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
        console.print(self.bar.progress)
        self.frames.append(console.file.getvalue().splitlines())


def frames(folder: Path, unit: str) -> list[list[str]]:
    module = make_module(make_roles(write_lm(folder / "base")))
    data = PromptData(
        TinyCorpus(), tokenizer(), batch_size=8, samples_per_prompt=1, iterations=2, eval_prompts=4, eval_batch_size=3,
        max_prompt_tokens=8, max_text_tokens=12, ptx_coef=0.0, seed=3,
    )  # fmt: skip
    bar = StageProgress(unit)
    seen = Frames(bar)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, log_every_n_steps=1, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_model_summary=False, logger=[Recorder()], default_root_dir=folder,
        callbacks=[RolloutCallback(make_maker(), seed=3), bar, seen],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return seen.frames


def test_it_is_one_line_with_the_unit_and_the_main_numbers(tmp_path: Path) -> None:
    found = frames(tmp_path, "PPO iterations")
    assert len(found) == 2
    for done, lines in enumerate(found, start=1):
        (line,) = lines
        assert line.startswith("PPO iterations")
        assert f"{done}/2" in line
        assert len(line.rstrip()) <= 80
    assert " score: " in found[1][0]
    assert "rollout/" not in found[1][0]


@pytest.mark.parametrize(("speed", "shown"), [(None, ""), (12.34, "12.3/s"), (1.0, "1.0/s"), (0.25, "4.0 s each")])
def test_slow_steps_are_given_in_seconds(speed: float | None, shown: str) -> None:
    class Timed(Task):
        @property
        def speed(self) -> float | None:
            return speed

    task = Timed(id=0, description="", total=1, completed=0, _get_time=lambda: 0.0)  # type: ignore[arg-type]
    assert str(RateColumn().render(task)) == shown
