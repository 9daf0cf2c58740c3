"""Log-probabilities and entropies through the vocabulary head, without ever holding its logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from src.kernels.linear import few_sizes, linear

IN_CACHE = 2**17  # vocabulary scores worked on at a time on a CPU: 512 KiB in float32
ON_GPU = 2**24  # and on a GPU: 64 MiB, enough to keep it busy
NARROWEST = 512  # words; fewer make poor matrix products


class _Head(torch.autograd.Function):
    """What arrives from above is two numbers per token, and the gradients of h are linear in them.

    So with frozen weights all but that product is done on the way forward, in the one pass over the vocabulary; with
    weights that learn the scores are computed again on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, both: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.both, ctx.frozen = temperature, both, not any(ctx.needs_input_grad[1:3])
        slopes = ctx.frozen and ctx.needs_input_grad[0]
        sums = _Sums(hidden, of_words=slopes, of_scored_words=slopes and both)
        for words, z in _scores(hidden, weight, bias, temperature):
            sums.add(z, weight[words], _Taken(ids, words))
        logprobs, entropy = sums.logprobs(), sums.entropy()
        if slopes:
            ctx.save_for_backward(*(slope.to(hidden.dtype) for slope in sums.slopes(weight[ids], entropy)))
        elif not ctx.frozen:
            ctx.save_for_backward(hidden, weight, bias, ids, sums.top + sums.ones.log(), entropy)
        if not both:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor, above_entropy: Tensor) -> tuple[Tensor | None, ...]:
        incoming = [g.unsqueeze(1) / ctx.temperature for g in ((above, above_entropy) if ctx.both else (above,))]
        none = [None] * 3
        if ctx.frozen:
            of_hidden = sum(g.to(slope.dtype) * slope for g, slope in zip(incoming, ctx.saved_tensors, strict=True))
            return of_hidden, None, None, *none
        hidden, weight, bias, ids, log_total, entropy = ctx.saved_tensors
        of_hidden, of_weight = above.new_zeros(hidden.shape), torch.empty_like(weight)
        of_bias = None if bias is None else torch.empty_like(bias)
        for words, z in _scores(hidden, weight, bias, ctx.temperature):
            log_p = z.sub_(log_total.unsqueeze(1))
            p = log_p.exp()
            own = _Taken(ids, words).add_to(-incoming[0] * p, incoming[0])
            if ctx.both:
                own -= incoming[1] * p * log_p.add_(entropy.unsqueeze(1))
            if of_bias is not None:
                of_bias[words] = own.sum(0)
            own = own.to(weight.dtype)
            of_hidden += linear(own, weight[words].t())
            of_weight[words] = linear(own.t(), hidden.t())
        return of_hidden.to(hidden.dtype), of_weight, of_bias, *none


class _Sums:
    """Sums over the words v of the vocabulary, kept up block by block: a softmax in one pass.

    All weigh a word by exp(z_v - m), m the largest score so far; where m grows, they are scaled. Source: "Online
    normalizer calculation for softmax" (https://arxiv.org/abs/1805.02867). Shapes: (N,), those of W_v (N, H).
    """

    def __init__(self, hidden: Tensor, *, of_words: bool, of_scored_words: bool) -> None:
        zeros = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        self.top, self.taken = zeros - torch.inf, zeros  # m, and the score of the token that was taken
        self.ones, self.scores = zeros, zeros  # of 1 and of z_v - m
        self.words = zeros.new_zeros(hidden.shape) if of_words else None  # of W_v
        self.scored_words = zeros.new_zeros(hidden.shape) if of_scored_words else None  # of (z_v - m) W_v

    def add(self, z: Tensor, weight: Tensor, taken: _Taken) -> None:
        """Take in a block of words: their scores (N, n), which are used up, and their weights (n, H)."""
        self.taken = self.taken + taken.read(z)
        self._raise(self.top.maximum(z.amax(dim=1)))
        p = z.sub_(self.top.unsqueeze(1)).exp()
        self.ones = self.ones + p.sum(dim=1)
        self.scores = self.scores + torch.linalg.vecdot(p, z)
        if self.words is not None:
            self.words += linear(p.to(weight.dtype), weight.t())
        if self.scored_words is not None:
            self.scored_words += linear(z.mul_(p).to(weight.dtype), weight.t())

    def _raise(self, top: Tensor) -> None:
        """From m to a larger m': exp(z - m') (z - m') = exp(m - m') exp(z - m) (z - m + m - m')."""
        step = torch.where(self.top.isinf(), 0, self.top - top)
        factor = step.exp()
        if self.scored_words is not None and self.words is not None:
            self.scored_words.addcmul_(self.words, step.unsqueeze(1)).mul_(factor.unsqueeze(1))
        if self.words is not None:
            self.words.mul_(factor.unsqueeze(1))
        self.scores = (self.scores + self.ones * step) * factor
        self.top, self.ones = top, self.ones * factor

    def logprobs(self) -> Tensor:
        """z_a - log sum_v exp(z_v)."""
        return self.taken - self.top - self.ones.log()

    def entropy(self) -> Tensor:
        """-sum_v p_v log p_v = log sum_v exp(z_v - m) - sum_v p_v (z_v - m)."""
        return self.ones.log() - self.scores / self.ones

    def slopes(self, of_taken: Tensor, entropy: Tensor) -> list[Tensor]:
        """W_a - sum_v p_v W_v, and where it is asked for -sum_v p_v (log p_v + H) W_v; (N, H) each."""
        assert self.words is not None
        mean = self.words / self.ones.unsqueeze(1)
        found = [of_taken - mean]
        if self.scored_words is not None:
            rest = (self.ones.log() - entropy).unsqueeze(1)
            found.append(rest * mean - self.scored_words / self.ones.unsqueeze(1))
        return found


class _Taken:
    """Which of the tokens ids (N,) lie in a block of words, and where."""

    def __init__(self, ids: Tensor, words: slice) -> None:
        place = (ids - words.start).unsqueeze(1)
        self.inside = (place >= 0) & (ids.unsqueeze(1) < words.stop)
        self.place = place.clamp(0, words.stop - words.start - 1)

    def read(self, z: Tensor) -> Tensor:
        """Their elements of z (N, n); 0 for those elsewhere. (N,)."""
        return torch.where(self.inside, z.gather(1, self.place), 0).squeeze(1)

    def add_to(self, z: Tensor, amount: Tensor) -> Tensor:
        """z (N, n) with `amount` (N, 1) added to those elements."""
        return z.scatter_add_(1, self.place, torch.where(self.inside, amount, 0))


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """z = (W h + b) / temperature in float32 or better, for so many words at a time that they stay in a CPU's cache.

    Yields words n of V and (N, n), which may be written to.
    """
    vocabulary = len(weight)
    has_cache = hidden.device.type == "cpu" and type(hidden) is Tensor  # not a stand-in without memory
    held = IN_CACHE if has_cache else ON_GPU
    step = max(NARROWEST, held // max(1, len(hidden)))
    for start in range(0, vocabulary, step):
        words = slice(start, min(start + step, vocabulary))
        z = linear(hidden, weight[words])
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if bias is not None:
            z.add_(bias[words])
        if temperature != 1:
            z.div_(temperature)
        yield words, z


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, entropy_trains: bool
) -> tuple[Tensor, Tensor]:
    """log pi(a) = z_a - logsumexp(z) and H = -sum_v pi_v log pi_v with z = (W h + b) / temperature, both in nats.

    The gradients, with pi = softmax(z):

        d log pi(a) / dz_v = [v = a] - pi_v
        d H / dz_v = -pi_v (log pi_v + H), left out unless `entropy_trains`

    Derived from the softmax; that no logits are held for them is the idea of "Cut Your Losses in Large-Vocabulary
    Language Models" (https://arxiv.org/abs/2411.09009). Shapes: hidden (N, H), weight (V, H), bias (V,), ids (N,) int64
    -> (N,), (N,) in float32 or better. The gradients cannot be differentiated again: that raises `RuntimeError`.
    """
    count = len(hidden)
    spare = few_sizes(count) - count
    # autocast would take the sum over the vocabulary in half precision
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropy = _Head.apply(  # type: ignore[no-untyped-call]
            pad(hidden, (0, 0, 0, spare)), weight, bias, pad(ids, (0, spare)), temperature, entropy_trains
        )
    return logprobs[:count], entropy[:count]
