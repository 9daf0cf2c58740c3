"""The rollout engine: tokens from a language model with a key-value cache, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.core.masking import masked, until_first_stop
from src.errors import require
from src.rollout.drawing import inverse_cdf
from src.rollout.kv_cache import OpenRows, prefill, trimmed
from src.rollout.replay import Block, replayable
from src.utils.distributed import RowShard

STEPS = 128  # of a block on a GPU: a step is captured once per block
ASKED = 16  # steps after which the device is asked whether all rows have ended


@dataclass(frozen=True)
class Sampler:
    """Draws a_t ~ softmax(logits / temperature) from the whole vocabulary until a stop token or the length limit.

    There is no top-k and no top-p on purpose: the distribution that is sampled must be the one whose logprobs are
    trained. Of a model's generation_config only the end tokens are read (`src.models.endings`).
    """

    max_new_tokens: int = 28
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse empty responses and a temperature that defines no distribution."""
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "greater than 0")

    @torch.no_grad()
    def sample(
        self,
        lm: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        stop_ids: Tensor,
        pad_id: int,
        generator: torch.Generator | None,
        share: RowShard | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A response to each prompt; without a generator each token is the most probable one (greedy).

        `share`: the rows of a larger batch that the prompts are; they draw the same tokens as in the whole batch.
        Shapes: prompt_ids and prompt_mask (B, P), padded on the left; stop_ids (K,). Returns response_ids (B, T),
        response_mask (B, T), logprobs (B, T) in nats and 0 outside the mask, finished (B,); T <= max_new_tokens.
        """
        tokens, logprobs = [], []
        for token, logprob in self.steps(lm, prompt_ids, prompt_mask, stop_ids, pad_id, generator, share):
            tokens.append(token)
            logprobs.append(logprob)
        response_ids = torch.stack(tokens, dim=1)
        response_mask, finished = until_first_stop(response_ids, stop_ids)
        width = int(response_mask.any(dim=0).sum())  # the device is not asked after each step whether all have ended
        mask = response_mask[:, :width]
        return response_ids[:, :width], mask, masked(torch.stack(logprobs, dim=1)[:, :width], mask), finished

    @torch.no_grad()
    def steps(
        self,
        lm: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        stop_ids: Tensor,
        pad_id: int,
        generator: torch.Generator | None,
        share: RowShard | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The next token of each row and its logprob, both (B,), as soon as drawn; `pad_id` and 0 after the end."""
        count, device = len(prompt_ids), prompt_ids.device
        own = torch.arange(count, device=device) if share is None else share.index.to(device)
        numbers = _uniforms(generator, own, count if share is None else share.rows)
        mask = trimmed(prompt_mask, prompt_mask)
        logits, cache = prefill(lm, trimmed(prompt_ids, prompt_mask), mask)
        token, logprob = self._draw(logits, next(numbers))
        yield token, logprob
        open_rows = OpenRows(torch.arange(count, device=device), cache, mask, prompt_mask.sum(dim=1), token)
        decode = self._replayed if replayable(lm, cache, device) else self._shrinking
        for rows, token, logprob in decode(lm, open_rows, stop_ids, pad_id, numbers):
            yield (
                token.new_full((count,), pad_id).index_copy(0, rows, token),
                logprob.new_zeros(count).index_copy(0, rows, logprob),
            )

    def _shrinking(
        self, lm: PreTrainedModel, rows: OpenRows, stop_ids: Tensor, _: int, numbers: Iterator[Tensor | None]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows that have ended leave the forward passes at once."""
        for step in range(1, self.max_new_tokens):
            ended = self._ended(rows.token, stop_ids, rows.index, step - 1)
            if ended.all():
                return
            if ended.any():
                rows.keep(without_gaps(~ended))
            u = next(numbers)
            rows.token, logprob = self._draw(rows.read(lm), None if u is None else u[rows.index])
            yield rows.index, rows.token, logprob

    def _replayed(
        self, lm: PreTrainedModel, rows: OpenRows, stop_ids: Tensor, pad_id: int, numbers: Iterator[Tensor | None]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """On a GPU: in blocks of equal steps; rows that have ended leave between blocks."""
        ended = self._ended(rows.token, stop_ids, rows.index, 0)
        for start in range(1, self.max_new_tokens, STEPS):
            kept = (~ended).nonzero().squeeze(1)
            if not len(kept):
                return
            if len(kept) < len(ended):
                rows.keep(kept)
                ended = ended[kept]
            stop = min(start + STEPS, self.max_new_tokens)
            block = Block(lm, self._draw, rows, stop - start)
            for step in range(start, stop):
                u = next(numbers)
                token, logprob = block.step(None if u is None else u[rows.index])
                yield rows.index, token.masked_fill(ended, pad_id), logprob.masked_fill(ended, 0)
                ended = ended | self._ended(token, stop_ids, rows.index, step)
                if step % ASKED == 0 and ended.all():
                    return
            rows = block.rows()

    def _ended(self, token: Tensor, stop_ids: Tensor, rows: Tensor, step: int) -> Tensor:
        """Which of the rows (N,) of the batch end with their token (N,) of this step, counted from 0."""
        return torch.isin(token, stop_ids)

    def _draw(self, logits: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """A token for each row of the logits (N, V), which are overwritten, and its logprob: (N,) each."""
        z = logits.float()
        if self.temperature != 1:
            z = z / self.temperature
        z.sub_(z.amax(dim=-1, keepdim=True))  # in place, as this runs over the vocabulary for every row and step
        p = z.exp()  # not divided by its sum, which the draw does not need
        token = z.argmax(dim=-1) if u is None else inverse_cdf(p, u)
        return token, z.gather(1, token.unsqueeze(1)).squeeze(1) - p.sum(dim=-1).log()


def without_gaps(stays: Tensor) -> Tensor:
    """The N rows that stay, of `stays` (B,): those among the first N keep their place, the others fill the gaps."""
    order = torch.arange(int(stays.sum()), device=stays.device)
    order[~stays[: len(order)]] = stays[len(order) :].nonzero().squeeze(1) + len(order)
    return order


def _uniforms(generator: torch.Generator | None, own: Tensor, rows: int) -> Iterator[Tensor | None]:
    """For each step one number for each of the own rows of a batch; None without a generator.

    Drawn for the whole batch, also for rows that ended or that other ranks hold.
    """
    while True:
        if generator is None:
            yield None
        else:
            yield torch.rand(rows, dtype=torch.float64, device=own.device, generator=generator)[own]
