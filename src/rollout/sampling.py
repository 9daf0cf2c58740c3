"""The rollout engine: tokens from a language model with a key-value cache, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from src.core.masking import masked, until_first_stop
from src.errors import require
from src.rollout.kv_cache import next_logits, prefill, reorder, trimmed
from src.utils.distributed import RowShard

BLOCK = 256  # probabilities per block; blocks are summed first, then only one per row in float64


@dataclass(frozen=True)
class Sampler:
    """Draws a_t ~ softmax(logits / temperature) from the whole vocabulary until a stop token or the length limit.

    There is no top-k and no top-p on purpose: the distribution that is sampled must be the one whose logprobs are
    trained. A model's generation_config is not read.
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
        return response_ids, response_mask, masked(torch.stack(logprobs, dim=1), response_mask), finished

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
        """The next token of each row and its logprob, both (B,), as soon as drawn; `pad_id` and 0 after the end.

        Rows that have ended leave the forward passes.
        """
        count = len(prompt_ids)
        rows = torch.arange(count, device=prompt_ids.device)  # rows that have not ended, in the order of the cache
        draws = rows if share is None else share.index.to(rows.device)
        mask, positions = trimmed(prompt_mask, prompt_mask), prompt_mask.sum(dim=1)
        logits, cache = prefill(lm, trimmed(prompt_ids, prompt_mask), mask)
        token = rows
        for step in range(self.max_new_tokens):
            if step > 0:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                logits = next_logits(lm, token.unsqueeze(1), mask, positions.unsqueeze(1), cache)
                positions = positions + 1
            u = self._uniforms(generator, count if share is None else share.rows, rows.device)
            token, logprob = self._draw(logits, None if u is None else u[draws[rows]])
            yield (
                token.new_full((count,), pad_id).index_copy(0, rows, token),
                logprob.new_zeros(count).index_copy(0, rows, logprob),
            )
            stays = ~self._ended(token, stop_ids, rows, step)
            if not stays.any():
                break
            if not stays.all():
                kept = without_gaps(stays)
                reorder(cache, kept)
                rows, token, mask, positions = rows[kept], token[kept], mask[kept], positions[kept]

    def _ended(self, token: Tensor, stop_ids: Tensor, rows: Tensor, step: int) -> Tensor:
        """Which of the rows (N,) of the batch end with their token (N,) of this step, counted from 0."""
        return torch.isin(token, stop_ids)

    @staticmethod
    def _uniforms(generator: torch.Generator | None, rows: int, device: torch.device) -> Tensor | None:
        """One number for each row of the whole batch, also for rows that ended or that other ranks hold."""
        if generator is None:
            return None
        return torch.rand(rows, dtype=torch.float64, device=device, generator=generator)

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


def inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """The first index a with p_0 + ... + p_a > u (p_0 + ... + p_V), which is drawn with probability p_a / sum(p).

    Source: Devroye, "Non-Uniform Random Variate Generation" (1986), chapter III.2. A probability of 0 is never drawn.
    torch.multinomial draws as many random numbers as there are probabilities, which takes ten times as long.
    Shapes: p (B, V), u (B,) float64 in [0, 1) -> (B,) int64.
    """
    blocks = pad(p, (0, -p.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(dim=-1).double()
    block, rest = _first_beyond(sums, u.unsqueeze(1) * sums.sum(dim=1, keepdim=True))
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK)).squeeze(1).double()
    index = block * BLOCK + _first_beyond(inside, rest)[0]
    return index.squeeze(1).clamp(max=p.shape[1] - 1)  # with NaN the index would be in the padding


def _first_beyond(weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first index (B, 1) where cumsum(weights (B, N)) exceeds x (B, 1), and x minus the sum before that index."""
    ends = weights.cumsum(dim=1)
    total = ends[:, -1:]
    x = x.minimum(total.nextafter(torch.zeros_like(total)))  # rounding must not give an index beyond the last
    index = torch.searchsorted(ends, x, right=True).clamp(max=weights.shape[1] - 1)  # NaN gives an index beyond
    return index, x - (ends - weights).gather(1, index)
