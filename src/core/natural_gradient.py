"""The natural gradient: solve F x = g without ever writing the Fisher matrix F down, and scale x to a KL bound."""

from __future__ import annotations

from collections.abc import Callable

import torch

from src.core.shapes import Row, Scalar


def conjugate_gradient(product: Callable[[Row], Row], target: Row, iterations: int, tolerance: float = 1e-10) -> Row:
    """x with A x = target for a symmetric positive definite A, of which only `product(v) = A v` is known.

    Source: Hestenes & Stiefel 1952, as in TRPO, appendix C (https://arxiv.org/abs/1502.05477). Stops after
    `iterations`, or when the squared residual is below `tolerance` times that of x = 0. Shapes: (N,) -> (N,).
    """
    solution, residual = torch.zeros_like(target), target.clone()
    direction, squared = residual.clone(), residual.dot(residual)
    enough = tolerance * squared
    for _ in range(iterations):
        if squared <= enough:
            break
        image = product(direction)
        step = squared / direction.dot(image)
        solution = solution + step * direction
        residual = residual - step * image
        previous, squared = squared, residual.dot(residual)
        direction = residual + (squared / previous) * direction
    return solution


def step_length(curvature: Scalar, max_kl: float) -> Scalar:
    """sqrt(2 max_kl / x^T F x): with it, the quadratic model of the KL reaches `max_kl` nats per token.

    Source: TRPO, appendix C. `curvature` is x^T F x, a scalar; 0 where the direction has none.
    """
    return torch.where(curvature > 0, (2 * max_kl / curvature.clamp(min=torch.finfo(curvature.dtype).tiny)).sqrt(), 0.0)
