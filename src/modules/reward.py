"""The reward stage: a scalar model learns which of two completions is preferred."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.core.diagnostics import calibration_error, correlation
from src.core.preference import centering, imitation, pairwise_accuracy, pairwise_loss
from src.models.reward_choices import RewardChoice
from src.models.reward_net import RewardNet
from src.modules.supervised import SupervisedModule
from src.utils.distributed import all_reduce_sum, map_over_ranks, row_shard
from src.utils.statistics import Figure, share


class RewardModule(SupervisedModule):
    """-log sigmoid(r(chosen) - r(rejected) - margin) + center + lm, in nats per pair.

    margin = `margin_coef` times the pair's gap (0 if unknown); center = center_coef (r(chosen) + r(rejected))^2;
    lm = lm_coef times the mean negative logprob of the chosen response's tokens. `net_choice` is the model.
    Accuracy is reported on held-out pairs with a gap of at least `min_gap`, on all, and between `gap_edges`.
    """

    prefix = "reward"
    net: RewardNet

    def __init__(
        self,
        net_choice: RewardChoice,
        tokenizer: PreTrainedTokenizerBase,
        min_gap: float,
        gap_edges: list[float],
        margin_coef: float,
        center_coef: float,
        lm_coef: float,
        **optimization: Any,
    ) -> None:
        net = net_choice.build(tokenizer, optimization["seed"], lm_coef > 0)
        super().__init__(net, tokenizer, **optimization)
        self.min_gap, self.gap_edges = min_gap, list(gap_edges)
        self.margin_coef, self.center_coef, self.lm_coef = margin_coef, center_coef, lm_coef
        self.test_rows: list[tuple[float, float]] = []  # (gap, 1 if ordered correctly) of each held-out pair
        self.margins: list[Tensor] = []
        self.scores_and_lengths: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """This rank's part of the mean over the pairs of the batch, and of the language-model loss over its tokens."""
        mine = row_shard(len(batch["gap"]))
        if self.lm_coef > 0:
            chosen, rejected, logprobs = self._scores_and_logprobs(batch, mine.index)
        else:
            chosen, rejected = self._scores(batch, mine.index)
        margin = self.margin_coef * batch["gap"][mine.index].nan_to_num(0.0)
        loss = pairwise_loss(chosen, rejected, margin).sum() / mine.rows
        self.log("reward/loss", all_reduce_sum(loss.detach()), prog_bar=True)
        if self.center_coef > 0:
            loss = loss + self.center_coef * centering(chosen, rejected).sum() / mine.rows
        if self.lm_coef > 0:
            lm_loss = imitation(logprobs) * len(logprobs) / max(predicted_tokens(batch), 1)
            self.log("reward/lm_loss", all_reduce_sum(lm_loss.detach()))
            loss = loss + self.lm_coef * lm_loss
        accuracy = pairwise_accuracy(chosen, rejected).sum() / mine.rows
        self.log("reward/accuracy", all_reduce_sum(accuracy), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on held-out pairs."""
        chosen, rejected = self._all_scores(batch)
        self.log("reward/val_loss", pairwise_loss(chosen, rejected).mean(), batch_size=len(chosen))
        self.log("reward/val_accuracy", pairwise_accuracy(chosen, rejected).mean(), batch_size=len(chosen))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Collect gap, order and margin of each held-out pair, and score and length of each of its texts.

        Margins are on the scale of the loss, where sigmoid(margin) is the model's probability of the preference.
        """
        chosen, rejected = self._all_scores(batch)
        right = pairwise_accuracy(chosen, rejected)
        self.test_rows += list(zip(batch["gap"].tolist(), right.tolist(), strict=True))
        self.margins.append(self.net.gain * (chosen - rejected).cpu())
        lengths = batch["mask"].sum(dim=1)
        self.scores_and_lengths.append(torch.stack([torch.cat([chosen, rejected]), lengths.to(chosen)]).cpu())

    def result(self) -> dict[str, dict[str, Figure]]:
        """Accuracy on pairs at least `min_gap` apart (or of unknown gap), on all, and by gap; calibration; length.

        `calibration_error`: expected calibration error over all pairs; `length_correlation`: of the score with the
        number of tokens of a text.
        """
        rows = self.test_rows
        figures = {
            "accuracy": [right for gap, right in rows if not gap < self.min_gap],
            "accuracy_all_pairs": [right for _, right in rows],
        }
        for low, high in pairwise([*self.gap_edges, float("inf")]):
            figures[f"accuracy_gap_{low:g}_to_{high:g}"] = [right for gap, right in rows if low <= gap < high]
        found = {name: share(values) for name, values in figures.items() if values}
        margins, (scores, lengths) = (
            torch.cat(self.margins).double(),
            torch.cat(self.scores_and_lengths, dim=1).double(),
        )
        found["calibration_error"] = Figure(calibration_error(margins).item(), len(margins), None)
        found["length_correlation"] = Figure(correlation(scores, lengths).item(), len(scores), None)
        return {"reward_model": found}

    def save(self, folder: Path) -> Path:
        """Write `model/` for plain transformers and, for an adapter, `adapter/` for peft and for the shared base."""
        return self.net.save(folder, self.tokenizer)

    def _all_scores(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        own = map_over_ranks(lambda mine: self._scores(batch, mine.index), len(batch["gap"]), in_step=True)
        chosen, rejected = map(torch.cat, zip(*own, strict=True))
        return chosen, rejected

    def _scores(self, batch: dict[str, Tensor], pairs: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([pairs, pairs + len(batch["gap"])])
        chosen, rejected = self.net.scores(batch["ids"][rows], batch["mask"][rows]).chunk(2)
        return chosen, rejected

    def _scores_and_logprobs(self, batch: dict[str, Tensor], pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.cat([pairs, pairs + len(batch["gap"])])
        of_pairs = batch["ids"][rows], batch["mask"][rows], batch["response_mask"][pairs]
        scores, logprobs = self.net.scores_and_logprobs(*of_pairs)
        return *scores.chunk(2), logprobs


def predicted_tokens(batch: dict[str, Tensor]) -> int:
    """How many tokens of the batch's chosen responses are predicted: those with a token before them."""
    return int((batch["mask"][: len(batch["gap"]), :-1] & batch["response_mask"][:, 1:]).sum())
