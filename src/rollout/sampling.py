"""The rollout engine: tokens from a language model with a key-value cache, one draw at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from src.core.checks import require
from src.core.masking import masked, position_ids, until_first_stop
from src.utils.ranks import Share


@dataclass(frozen=True)
class Sampler:
    """Draws a_t ~ softmax(logits / temperature) from the whole vocabulary until a stop token or the length limit.

    There is no top-k and no top-p on purpose: the distribution that is sampled must be the one whose logprobs are
    trained. Whatever a model's generation_config says is not read.
    """

    max_new_tokens: int
    temperature: float

    def __post_init__(self) -> None:
        """Refuse empty responses and a temperature without a distribution."""
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
        share: Share | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Answer each prompt; without a generator the most probable token is taken (greedy).

        `share` says which rows of a larger batch the prompts are: they draw what they would draw in the whole of it.
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
        share: Share | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The next token of each row and its logprob, both (B,), as soon as they are drawn; `pad_id` after the end."""
        cache, mask = DynamicCache(config=lm.config), prompt_mask
        ids, positions = prompt_ids, position_ids(prompt_mask)
        finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for _ in range(self.max_new_tokens):
            output = lm(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            token, logprob = self._draw(output.logits[:, -1], generator, share)
            token_or_pad = torch.where(finished, pad_id, token)
            yield token_or_pad, logprob
            finished = finished | torch.isin(token, stop_ids)
            if finished.all():
                break
            ids, positions = token_or_pad.unsqueeze(1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)

    def _draw(self, logits: Tensor, generator: torch.Generator | None, share: Share | None) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        if generator is None:
            token = logprobs.argmax(dim=-1)
        else:
            # p / e is largest at a with probability p_a, for independent e ~ Exp(1): as torch.multinomial does it
            rows = len(logprobs) if share is None else share.rows
            races = logprobs.new_empty(rows, logprobs.shape[1]).exponential_(generator=generator)
            token = (logprobs.exp() / (races if share is None else races[share.index])).argmax(dim=-1)
        return token, logprobs.gather(1, token.unsqueeze(1)).squeeze(1)
