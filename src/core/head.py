"""Log-probabilities and entropies through the vocabulary head, without keeping its logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from src.core.linear import linear

IN_CACHE = 2**18  # vocabulary scores worked on at a time on a CPU: 1 MiB in float32
ON_GPU = 2**22  # and on a GPU: 16 MiB, enough to keep it busy


class _Head(torch.autograd.Function):
    """What arrives from above is two numbers per token, and the gradients of h are linear in them.

    So with frozen weights all but that product is done on the way forward, while the logits are there; with weights
    that learn the logits are computed again on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, both: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.both, ctx.frozen = temperature, both, not any(ctx.needs_input_grad[1:3])
        slopes = ctx.frozen and ctx.needs_input_grad[0]
        logits = linear(hidden, weight)
        of_entropy = torch.empty_like(logits) if slopes and both else None
        taken, entropy = [], []
        for rows, z, p, log_total in _softmax(logits, bias, temperature):
            taken.append(z.gather(1, ids[rows].unsqueeze(1)).squeeze(1) - log_total)
            entropy.append(log_total - torch.linalg.vecdot(p, z))
            if of_entropy is not None:
                of_entropy[rows] = _entropy_slope(p, z, log_total, entropy[-1])
            if slopes:
                logits[rows] = p
        if slopes:
            kept = [weight[ids] - linear(logits, weight.t())]
            ctx.save_for_backward(*kept, *([] if of_entropy is None else [linear(of_entropy, weight.t())]))
        elif not ctx.frozen:
            ctx.save_for_backward(hidden, weight, bias, ids)
        result = torch.cat(taken), torch.cat(entropy)
        if not both:
            ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor, above_entropy: Tensor) -> tuple[Tensor | None, ...]:
        incoming = [above, above_entropy] if ctx.both else [above]
        incoming = [g.unsqueeze(1) / ctx.temperature for g in incoming]
        none = [None] * 3
        if ctx.frozen:
            of_hidden = sum(g.to(slope.dtype) * slope for g, slope in zip(incoming, ctx.saved_tensors, strict=True))
            return of_hidden, None, None, *none
        hidden, weight, bias, ids = ctx.saved_tensors
        slope = linear(hidden, weight)
        of_bias = None if bias is None else torch.zeros_like(bias)
        for rows, z, p, log_total in _softmax(slope, bias, ctx.temperature):
            own = -incoming[0][rows] * p
            own.scatter_add_(1, ids[rows].unsqueeze(1), incoming[0][rows])
            if ctx.both:
                entropy = log_total - torch.linalg.vecdot(p, z)
                own.add_(incoming[1][rows] * _entropy_slope(p, z, log_total, entropy))
            if of_bias is not None:
                of_bias += own.sum(0)
            slope[rows] = own
        return linear(slope, weight.t()), linear(slope.t(), hidden.t()), of_bias, *none


def _softmax(logits: Tensor, bias: Tensor | None, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """z_v - max z, p_v and log sum_v exp(z_v - max z) of z = (logits + bias) / temperature, in float32 or better.

    Some rows at a time, so few on a CPU that they stay in its cache; z may lie where they lay in `logits`.
    Yields rows n of (N, V): the slice, (n, V), (n, V), (n,).
    """
    has_cache = logits.device.type == "cpu" and type(logits) is Tensor  # not a stand-in without memory
    step = max(1, (IN_CACHE if has_cache else ON_GPU) // logits.shape[1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        z = logits[rows].to(torch.promote_types(logits.dtype, torch.float32))
        if bias is not None:
            z.add_(bias)
        if temperature != 1:
            z.div_(temperature)
        z.sub_(z.amax(dim=1, keepdim=True))
        p = z.exp()
        total = p.sum(dim=1)
        yield rows, z, p.div_(total.unsqueeze(1)), total.log()


def _entropy_slope(p: Tensor, z: Tensor, log_total: Tensor, entropy: Tensor) -> Tensor:
    """dH / dz_v = -p_v (log p_v + H), written over `z`. Shapes: (n, V), (n, V), (n,), (n,) -> (n, V)."""
    return z.sub_((log_total - entropy).unsqueeze(1)).mul_(p).neg_()


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, entropy_trains: bool
) -> tuple[Tensor, Tensor]:
    """log pi(a) = z_a - logsumexp(z) and H = -sum_v pi_v log pi_v with z = (W h + b) / temperature, both in nats.

    The gradients, with pi = softmax(z):

        d log pi(a) / dz_v = [v = a] - pi_v
        d H / dz_v = -pi_v (log pi_v + H), left out unless `entropy_trains`

    Derived from the softmax; that no logits are kept for them is the idea of Liger's fused cross-entropy
    (https://arxiv.org/abs/2410.10989). Shapes: hidden (N, H), weight (V, H), bias (V,), ids (N,) int64 -> (N,), (N,) in
    float32 or better. The gradients cannot be differentiated again: that raises `RuntimeError`.
    """
    # autocast would take the sum over the vocabulary in half precision
    with torch.autocast(hidden.device.type, enabled=False):
        both: tuple[Tensor, Tensor] = _Head.apply(hidden, weight, bias, ids, temperature, entropy_trains)  # type: ignore[no-untyped-call]
    return both
