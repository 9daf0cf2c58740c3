"""The reward stage: a scalar model learns which of two completions people prefer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from src.core.preference import pairwise_accuracy, pairwise_loss
from src.models.forward import sequence_scores
from src.models.settings import ScratchSettings
from src.modules.supervised import SupervisedModule
from src.utils.figures import Figure, bootstrap_mean
from src.utils.streams import stream_seed


class RewardModule(SupervisedModule):
    """-log sigmoid(r(chosen) - r(rejected)) in nats per pair; a separate model with a tokenizer of its own.

    `min_gap`: accuracy is reported on held-out pairs at least so far apart, and on all; `gap_edges`: and by gap.
    """

    prefix = "reward"

    def __init__(
        self,
        scratch: ScratchSettings,
        tokenizer: PreTrainedTokenizerBase,
        min_gap: float,
        gap_edges: list[float],
        **optimization: Any,
    ) -> None:
        net = build_scalar_model(scratch, tokenizer, optimization["seed"])
        super().__init__(net, tokenizer, **optimization)
        self.min_gap, self.gap_edges = min_gap, list(gap_edges)
        self.test_rows: list[tuple[float, float]] = []  # (gap, 1 when ordered rightly) of each held-out pair

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean over the pairs of the batch."""
        chosen, rejected = self._scores(batch)
        loss = pairwise_loss(chosen, rejected).mean()
        self.log("reward/loss", loss, prog_bar=True)
        self.log("reward/accuracy", pairwise_accuracy(chosen, rejected).mean(), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on held-out pairs."""
        chosen, rejected = self._scores(batch)
        self.log("reward/val_loss", pairwise_loss(chosen, rejected).mean(), batch_size=len(chosen))
        self.log("reward/val_accuracy", pairwise_accuracy(chosen, rejected).mean(), batch_size=len(chosen))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Collect gap and order of each held-out pair."""
        accuracy = pairwise_accuracy(*self._scores(batch))
        self.test_rows += list(zip(batch["gap"].tolist(), accuracy.tolist(), strict=True))

    def result(self) -> dict[str, dict[str, Figure]]:
        """Accuracy on pairs at least `min_gap` apart (or of unknown gap), on all pairs, and by gap."""
        rows = self.test_rows
        figures = {
            "accuracy": [right for gap, right in rows if not gap < self.min_gap],
            "accuracy_all_pairs": [right for _, right in rows],
        }
        for low, high in pairwise([*self.gap_edges, float("inf")]):
            figures[f"accuracy_gap_{low:g}_to_{high:g}"] = [right for gap, right in rows if low <= gap < high]
        return {"reward_model": {name: bootstrap_mean(values) for name, values in figures.items() if values}}

    def save(self, folder: Path) -> Path:
        """Write a folder that `AutoModelForSequenceClassification.from_pretrained` loads."""
        self.net.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        return folder / "model"

    def _scores(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        chosen, rejected = sequence_scores(self.net, batch["ids"], batch["mask"]).chunk(2)
        return chosen, rejected


def build_scalar_model(scratch: ScratchSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A fresh model with one output."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, "weights"))
        return AutoModelForSequenceClassification.from_config(scratch.config_for(tokenizer, num_labels=1))
