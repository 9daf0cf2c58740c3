"""The policy's distribution over the next token, kept as what the vocabulary head reads: (N, H), not (N, V)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.core.kl import categorical_kl
from src.core.logprobs import entropy_from_logits, logprobs_from_logits, normalised_logits

CHUNK = 2**24  # vocabulary scores held at a time (64 MiB in float32); more tokens than fit are done in turn


@dataclass(frozen=True)
class TokenDistribution:
    """pi(. | s_t) at the N counted response tokens of a rollout; the vocabulary head runs on these alone."""

    hidden: Tensor  # (N, H)
    head: nn.Module
    ids: Tensor  # (N,) int64, the tokens that were taken
    mask: Tensor  # (B, T) bool, True at the N places
    temperature: float

    def logprobs_and_entropy(self) -> tuple[Tensor, Tensor]:
        """log pi(a_t | s_t) and the entropy of pi(. | s_t), both (B, T) nats and 0 outside the mask."""

        def read(hidden: Tensor, ids: Tensor) -> Tensor:
            logits = self.head(hidden)
            taken = logprobs_from_logits(logits, ids, self.temperature)
            return torch.stack([taken, entropy_from_logits(logits, self.temperature)], dim=-1)

        logprobs, entropy = self._in_chunks(read, self.hidden, self.ids).unbind(dim=-1)
        return self._placed(logprobs), self._placed(entropy)

    def logprobs(self) -> Tensor:
        """log pi(a_t | s_t), (B, T) nats."""
        return self.logprobs_and_entropy()[0]

    def kl(self, other: TokenDistribution) -> Tensor:
        """KL(self || other) over the whole vocabulary, (B, T) nats and 0 outside the mask."""

        def read(hidden: Tensor, other_hidden: Tensor) -> Tensor:
            log_p = normalised_logits(self.head(hidden), self.temperature)
            return categorical_kl(log_p, normalised_logits(other.head(other_hidden), other.temperature))

        return self._placed(self._in_chunks(read, self.hidden, other.hidden))

    def detached(self) -> TokenDistribution:
        """The same numbers, without gradient and whatever happens to the weights later."""
        trained = any(parameter.requires_grad for parameter in self.head.parameters())
        head = copy.deepcopy(self.head).requires_grad_(False) if trained else self.head
        return replace(self, hidden=self.hidden.detach(), head=head)

    def _in_chunks(self, read: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`read` of all tokens, so many at a time that their vocabulary scores fit; recomputed in the backward pass."""
        vocabulary = self.head.weight.shape[0]
        assert isinstance(vocabulary, int)
        size = max(1, CHUNK // vocabulary)
        if len(self.hidden) <= size:
            return read(*inputs)
        pieces = zip(*(x.split(size) for x in inputs), strict=True)
        return torch.cat([checkpoint(read, *piece, use_reentrant=False) for piece in pieces])

    def _placed(self, x: Tensor) -> Tensor:
        return torch.zeros(self.mask.shape, dtype=x.dtype, device=x.device).masked_scatter(self.mask, x)
