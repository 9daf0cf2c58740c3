"""Log-probabilities and entropies through the vocabulary head, without ever holding its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from src.models.head_function import capped_logprobs, function_of

IN_CACHE = 2**17  # logits computed at a time on a CPU: 512 KiB in float32
ON_GPU = 2**24  # and on a GPU: 64 MiB, enough to keep it busy
NARROWEST = 512  # words; matrix products with fewer are slow

Product = Callable[[Tensor, Tensor], Tensor]  # x (N, K), weight (M, K) -> x W^T (N, M)


class _Head(torch.autograd.Function):
    """Log-probabilities and entropies from hidden states, and their gradients.

    The backward pass receives two numbers per token, and the gradient of h is linear in them. With frozen weights the
    forward pass therefore computes the gradient up to these factors, in the same pass over the vocabulary; with
    trained weights the backward pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        both: bool,
        product: Product,
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.both, ctx.frozen = temperature, both, not any(ctx.needs_input_grad[1:3])
        ctx.product = product
        slopes = ctx.frozen and ctx.needs_input_grad[0]
        sums = _Sums(hidden, product, of_words=slopes, of_scored_words=slopes and both)
        for words, z in _scores(hidden, weight, bias, temperature, product):
            sums.add(z, weight[words], _Chosen(ids, words))
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
        none = [None] * 4
        if ctx.frozen:
            of_hidden = sum(g.to(slope.dtype) * slope for g, slope in zip(incoming, ctx.saved_tensors, strict=True))
            return of_hidden, None, None, *none
        hidden, weight, bias, ids, log_total, entropy = ctx.saved_tensors
        of_hidden, of_weight = above.new_zeros(hidden.shape), torch.empty_like(weight)
        of_bias = None if bias is None else torch.empty_like(bias)
        for words, z in _scores(hidden, weight, bias, ctx.temperature, ctx.product):
            log_p = z.sub_(log_total.unsqueeze(1))
            p = log_p.exp()
            own = _Chosen(ids, words).add_to(-incoming[0] * p, incoming[0])
            if ctx.both:
                own -= incoming[1] * p * log_p.add_(entropy.unsqueeze(1))
            if of_bias is not None:
                of_bias[words] = own.sum(0)
            own = own.to(weight.dtype)
            of_hidden += ctx.product(own, weight[words].t())
            of_weight[words] = ctx.product(own.t(), hidden.t())
        return of_hidden.to(hidden.dtype), of_weight, of_bias, *none


class _Sums:
    """Sums over the words v of the vocabulary, updated block by block: a softmax in one pass.

    Each weighs a word by exp(z_v - m), with m the largest logit so far, and is rescaled when m grows. Source: "Online
    normalizer calculation for softmax" (https://arxiv.org/abs/1805.02867). Shapes: (N,), those of W_v (N, H).
    """

    def __init__(self, hidden: Tensor, product: Product, *, of_words: bool, of_scored_words: bool) -> None:
        self.product = product
        zeros = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        self.top, self.chosen = zeros - torch.inf, zeros  # m, and the logit of the token a
        self.ones, self.scores = zeros, zeros  # of 1 and of z_v - m
        self.words = zeros.new_zeros(hidden.shape) if of_words else None  # of W_v
        self.scored_words = zeros.new_zeros(hidden.shape) if of_scored_words else None  # of (z_v - m) W_v

    def add(self, z: Tensor, weight: Tensor, chosen: _Chosen) -> None:
        """Add a block of words: their logits (N, n), which are overwritten, and their weights (n, H)."""
        self.chosen = self.chosen + chosen.read(z)
        self._raise(self.top.maximum(z.amax(dim=1)))
        p = z.sub_(self.top.unsqueeze(1)).exp()
        self.ones = self.ones + p.sum(dim=1)
        self.scores = self.scores + torch.linalg.vecdot(p, z)
        if self.words is not None:
            self.words += self.product(p.to(weight.dtype), weight.t())
        if self.scored_words is not None:
            self.scored_words += self.product(z.mul_(p).to(weight.dtype), weight.t())

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
        return self.chosen - self.top - self.ones.log()

    def entropy(self) -> Tensor:
        """-sum_v p_v log p_v = log sum_v exp(z_v - m) - sum_v p_v (z_v - m)."""
        return self.ones.log() - self.scores / self.ones

    def slopes(self, of_chosen: Tensor, entropy: Tensor) -> list[Tensor]:
        """W_a - sum_v p_v W_v, and with `of_scored_words` -sum_v p_v (log p_v + H) W_v; (N, H) each."""
        assert self.words is not None
        mean = self.words / self.ones.unsqueeze(1)
        found = [of_chosen - mean]
        if self.scored_words is not None:
            rest = (self.ones.log() - entropy).unsqueeze(1)
            found.append(rest * mean - self.scored_words / self.ones.unsqueeze(1))
        return found


class _Chosen:
    """Which of the tokens ids (N,) are in a block of words, and where."""

    def __init__(self, ids: Tensor, words: slice) -> None:
        place = (ids - words.start).unsqueeze(1)
        self.inside = (place >= 0) & (ids.unsqueeze(1) < words.stop)
        self.place = place.clamp(0, words.stop - words.start - 1)

    def read(self, z: Tensor) -> Tensor:
        """The elements of z (N, n) at the tokens; 0 for tokens outside the block. (N,)."""
        return torch.where(self.inside, z.gather(1, self.place), 0).squeeze(1)

    def add_to(self, z: Tensor, amount: Tensor) -> Tensor:
        """z (N, n) with `amount` (N, 1) added to those elements."""
        return z.scatter_add_(1, self.place, torch.where(self.inside, amount, 0))


def _scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, product: Product
) -> Iterator[tuple[slice, Tensor]]:
    """z = (W h + b) / temperature in float32 or better, in blocks of words that fit into a CPU's cache.

    Yields words n of V and (N, n), which may be overwritten.
    """
    vocabulary = len(weight)
    has_cache = hidden.device.type == "cpu" and type(hidden) is Tensor  # not a fake tensor
    held = IN_CACHE if has_cache else ON_GPU
    step = max(NARROWEST, held // max(1, len(hidden)))
    for start in range(0, vocabulary, step):
        words = slice(start, min(start + step, vocabulary))
        z = product(hidden, weight[words])
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if bias is not None:
            z.add_(bias[words])
        if temperature != 1:
            z.div_(temperature)
        yield words, z


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    temperature: float,
    entropy_trains: bool,
    product: Product = linear,
) -> tuple[Tensor, Tensor]:
    """log pi(a) = z_a - logsumexp(z) and H = -sum_v pi_v log pi_v with z = (W h + b) / temperature, both in nats.

    The gradients, with pi = softmax(z):

        d log pi(a) / dz_v = [v = a] - pi_v
        d H / dz_v = -pi_v (log pi_v + H), left out unless `entropy_trains`

    Derived from the softmax; not holding the logits for them is the idea of "Cut Your Losses in Large-Vocabulary
    Language Models" (https://arxiv.org/abs/2411.09009). Shapes: hidden (N, H), weight (V, H), bias (V,), ids (N,) int64
    -> (N,), (N,) in float32 or better. The gradients cannot be differentiated again: that raises `RuntimeError`.
    """
    # autocast would sum over the vocabulary in half precision
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropy = _Head.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, ids, temperature, entropy_trains, product
        )
    return logprobs, entropy


def token_logprobs(
    head: nn.Module, hidden: Tensor, ids: Tensor, temperature: float = 1.0, *, entropy_trains: bool = False
) -> tuple[Tensor, Tensor]:
    """`head_logprobs` of a vocabulary head, in the dtype of its matrix products.

    Every log-probability of the project comes from here: PPO, SFT, PPO-ptx and the reward model's LM loss. A fast head
    (`src.kernels`) has its own product, and numbers of rows that suit it.
    Shapes: hidden (N, H), ids (N,) int64 -> (N,), (N,) nats.
    """
    function = function_of(head)
    if function.cap is not None:
        return capped_logprobs(head, hidden.to(head.weight.dtype), ids, temperature)
    temperature = temperature / function.scale
    dtype, count = computing_dtype(head.weight), len(hidden)
    weight, bias = head.weight.to(dtype), getattr(head, "bias", None)
    product, rows = getattr(head, "product", linear), getattr(head, "rows", int)(count)
    hidden, ids = pad(hidden.to(dtype), (0, 0, 0, rows - count)), pad(ids, (0, rows - count))
    logprobs, entropy = head_logprobs(hidden, weight, bias, ids, temperature, entropy_trains, product)
    return logprobs[:count], entropy[:count]


def computing_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a matrix product with `weight`: autocast's if it is on, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
