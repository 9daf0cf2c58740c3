"""Log-probabilities and entropies through the vocabulary head, without keeping its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.core.linear import linear


class _Head(torch.autograd.Function):
    """What arrives from above is two numbers per token, and the gradients of h are linear in them.

    So with frozen weights all but that product is done on the way forward, while the logits are there; with weights
    that learn the logits are computed again on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, both: bool
    ) -> tuple[Tensor, Tensor]:
        p, logits, log_total = _softmax(hidden, weight, bias, temperature)
        entropy = log_total - torch.einsum("nv,nv->n", p, logits)
        taken = logits.gather(1, ids.unsqueeze(1)).squeeze(1) - log_total
        ctx.temperature, ctx.both, ctx.frozen = temperature, both, not any(ctx.needs_input_grad[1:3])
        if not both:
            ctx.mark_non_differentiable(entropy)
        if not ctx.frozen:
            ctx.save_for_backward(hidden, weight, bias, ids)
        elif ctx.needs_input_grad[0]:
            slopes = [weight[ids] - linear(p.to(weight.dtype), weight.t())]
            if both:
                slopes.append(linear(_entropy_slope(p, logits, log_total, entropy).to(weight.dtype), weight.t()))
            ctx.save_for_backward(*slopes)
        return taken, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor, above_entropy: Tensor) -> tuple[Tensor | None, ...]:
        incoming = [above, above_entropy] if ctx.both else [above]
        incoming = [g.unsqueeze(1) / ctx.temperature for g in incoming]
        if ctx.frozen:
            return sum(g.to(slope.dtype) * slope for g, slope in zip(incoming, ctx.saved_tensors, strict=True)), *[
                None
            ] * 5
        hidden, weight, bias, ids = ctx.saved_tensors
        p, logits, log_total = _softmax(hidden, weight, bias, ctx.temperature)
        slope = -incoming[0] * p
        slope.scatter_add_(1, ids.unsqueeze(1), incoming[0])
        if ctx.both:
            entropy = log_total - torch.einsum("nv,nv->n", p, logits)
            slope.add_(incoming[1] * _entropy_slope(p, logits, log_total, entropy))
        to_weight = slope.to(hidden.dtype)
        of_hidden, of_weight = linear(to_weight, weight.t()), linear(to_weight.t(), hidden.t())
        return of_hidden, of_weight, None if bias is None else slope.sum(0), None, None, None


def _softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """p_v, z_v - max z and log sum_v exp(z_v - max z) of z = (W h + b) / temperature, in float32 or better.

    Shapes: hidden (N, H), weight (V, H), bias (V,) -> (N, V), (N, V), (N,).
    """
    logits = linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits.add_(bias)
    if temperature != 1:
        logits.div_(temperature)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    p = logits.exp()
    total = p.sum(dim=1)
    return p.div_(total.unsqueeze(1)), logits, total.log()


def _entropy_slope(p: Tensor, logits: Tensor, log_total: Tensor, entropy: Tensor) -> Tensor:
    """dH / dz_v = -p_v (log p_v + H), written over `logits`. Shapes: (N, V), (N, V), (N,), (N,) -> (N, V)."""
    return logits.sub_((log_total - entropy).unsqueeze(1)).mul_(p).neg_()


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
    with torch.autocast(
        hidden.device.type, enabled=False
    ):  # it would take the sum over the vocabulary in half precision
        both: tuple[Tensor, Tensor] = _Head.apply(hidden, weight, bias, ids, temperature, entropy_trains)  # type: ignore[no-untyped-call]
    return both
