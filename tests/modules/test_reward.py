"""The reward stage: its loss, its test figures, and a folder that loads with the same scores."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForSequenceClassification, get_constant_schedule

from src.data.modules import PairData
from src.models.settings import ScratchSettings
from src.modules.reward import RewardModule
from src.rewards.learned import LearnedReward
from src.types import PreferencePair
from tests.tiny import EOS, FOREIGN_WARNINGS, Recorder, TinyCorpus, gpt2_config, tokenizer

pytestmark = FOREIGN_WARNINGS

PAIRS = [
    PreferencePair("the film", " was great .", " was bad .", gap=0.1),
    PreferencePair("a", " great cast .", " dull end , we did not .", gap=0.3),
    PreferencePair("they loved", " the plot .", ".", gap=0.8),
    PreferencePair("we liked", " the cast and the end .", " a bad film .", gap=None),
    PreferencePair("the plot", " was bright .", " was long and dull .", gap=1.4),
    PreferencePair("great", " .", " a bad film , a bad cast .", gap=0.5),
]


class Pairs(TinyCorpus):
    """The pairs above in every split."""

    def pairs(self, split: str) -> list[PreferencePair]:
        return PAIRS


def make(**config: Any) -> RewardModule:
    def config_of(**ids: Any) -> Any:
        return gpt2_config(**(ids | config))

    return RewardModule(
        ScratchSettings(config_of, lambda texts: tokenizer()), tokenizer(), min_gap=0.5, gap_edges=[0.0, 0.5, 1.0],
        optimizer=partial(torch.optim.SGD, lr=0.0), lr_schedule=get_constant_schedule, max_grad_norm=1.0, seed=1,
    )  # fmt: skip


def trainer(tmp_path: Path, recorder: Recorder) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, max_epochs=1, log_every_n_steps=1, num_sanity_val_steps=0, logger=[recorder],
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip


def data(batch_size: int) -> PairData:
    return PairData(Pairs(), tokenizer(), batch_size=batch_size, steps=1, max_tokens=40, seed=1)


def plain_differences(module: RewardModule) -> list[float]:
    """r(chosen) - r(rejected) of each pair, every text alone and unpadded."""

    def score(text: str) -> float:
        ids = torch.tensor([[*tokenizer()(text)["input_ids"], EOS]])
        with torch.no_grad():
            return module.net(input_ids=ids).logits[0, 0].item()

    module.eval()
    return [score(p.prompt + p.chosen) - score(p.prompt + p.rejected) for p in PAIRS]


def test_the_loss_is_minus_log_sigmoid_of_the_difference(tmp_path: Path) -> None:
    """Checklist 26, 27. One batch that holds each pair once, in any order."""
    module, recorder = make(), Recorder()
    differences = plain_differences(module)
    assert 0 < sum(d > 0 for d in differences) < 6
    module.train()
    trainer(tmp_path, recorder).fit(module, datamodule=data(6))
    logged = recorder.by_step()
    loss = sum(math.log1p(math.exp(-d)) for d in differences) / 6
    assert logged[1]["reward/loss"] == pytest.approx(loss, abs=1e-5)
    assert logged[1]["reward/accuracy"] == pytest.approx(sum(d > 0 for d in differences) / 6)
    assert {k: v for row in logged.values() for k, v in row.items()}["reward/val_loss"] == pytest.approx(loss, abs=1e-5)


def test_the_test_figures_are_accuracies_by_gap(tmp_path: Path) -> None:
    """Checklist 27. `accuracy` leaves out pairs nearer than min_gap, but not those of unknown gap."""
    module = make()
    right = [d > 0 for d in plain_differences(module)]
    trainer(tmp_path, Recorder()).test(module, datamodule=data(4), verbose=False)
    figures = module.result()["reward_model"]

    def share(rows: list[int]) -> tuple[float, int]:
        return pytest.approx(sum(right[i] for i in rows) / len(rows)), len(rows)

    assert (figures["accuracy"].value, figures["accuracy"].n) == share([2, 3, 4, 5])
    assert (figures["accuracy_all_pairs"].value, figures["accuracy_all_pairs"].n) == share(list(range(6)))
    by_gap = {name: (f.value, f.n) for name, f in figures.items() if "gap" in name}
    assert by_gap == {
        "accuracy_gap_0_to_0.5": share([0, 1]),
        "accuracy_gap_0.5_to_1": share([2, 5]),
        "accuracy_gap_1_to_inf": share([4]),
    }


def test_the_folder_gives_the_same_scores_in_plain_transformers_and_as_a_reward(tmp_path: Path) -> None:
    """Checklist 25."""
    module = make()
    differences = plain_differences(module)
    folder = module.save(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.num_labels == 1
    reward = LearnedReward(str(folder), 4)
    metadata: list[dict[str, Any]] = [{}] * 6
    chosen = reward.score([p.prompt for p in PAIRS], [p.chosen for p in PAIRS], metadata)
    rejected = reward.score([p.prompt for p in PAIRS], [p.rejected for p in PAIRS], metadata)
    assert (chosen - rejected).tolist() == pytest.approx(differences, abs=1e-5)


def test_the_same_seed_gives_the_same_fresh_model() -> None:
    torch.manual_seed(0)
    one = make()
    torch.manual_seed(1)
    two = make()
    assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True))
