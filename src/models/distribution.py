"""The policy's distribution over the next token, kept as the vocabulary head's inputs: (N, H), not (N, V)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.core.kl import categorical_kl
from src.core.logprobs import normalized_logits
from src.models.head_function import CHUNK, logits
from src.models.vocab_head import token_logprobs


@dataclass(frozen=True)
class TokenDistribution:
    """pi(. | s_t) at the N counted response tokens of a rollout; the vocabulary head runs on these alone."""

    hidden: Tensor  # (N, H)
    head: nn.Module
    ids: Tensor  # (N,) int64, the sampled tokens
    mask: Tensor  # (B, T) bool, True at the N places
    temperature: float

    def logprobs_and_entropy(self, entropy_trains: bool = True) -> tuple[Tensor, Tensor]:
        """log pi(a_t | s_t) and the entropy of pi(. | s_t), both (B, T) nats and 0 outside the mask.

        Without `entropy_trains` the entropy may have no gradient, which costs less.
        """
        logprobs, entropy = token_logprobs(
            self.head, self.hidden, self.ids, self.temperature, entropy_trains=entropy_trains
        )
        return self._placed(logprobs), self._placed(entropy)

    def logprobs(self) -> Tensor:
        """log pi(a_t | s_t), (B, T) nats."""
        return self.logprobs_and_entropy(entropy_trains=False)[0]

    def kl(self, other: TokenDistribution) -> Tensor:
        """KL(self || other) over the whole vocabulary, (B, T) nats and 0 outside the mask."""

        def read(hidden: Tensor, other_hidden: Tensor) -> Tensor:
            log_p = normalized_logits(logits(self.head, hidden), self.temperature)
            return categorical_kl(log_p, normalized_logits(logits(other.head, other_hidden), other.temperature))

        return self._placed(self._in_chunks(read, self.hidden, other.hidden))

    def detached(self) -> TokenDistribution:
        """The same numbers, without gradient and independent of later changes of the weights."""
        trained = any(parameter.requires_grad for parameter in self.head.parameters())
        head = copy.deepcopy(self.head).requires_grad_(False) if trained else self.head
        return replace(self, hidden=self.hidden.detach(), head=head)

    def _in_chunks(self, read: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`read` of all tokens, in chunks whose logits fit; recomputed in the backward pass."""
        if len(self.hidden) <= self._chunk:
            return read(*inputs)
        pieces = zip(*(x.split(self._chunk) for x in inputs), strict=True)
        return torch.cat([checkpoint(read, *piece, use_reentrant=False) for piece in pieces])

    @property
    def _chunk(self) -> int:
        """Tokens per chunk."""
        return max(1, CHUNK // self.head.weight.shape[0])

    def _placed(self, x: Tensor) -> Tensor:
        return torch.zeros(self.mask.shape, dtype=x.dtype, device=x.device).masked_scatter(self.mask, x)
