"""Conjugate gradients against a direct solver, and the length of a step against the KL it is to spend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.core.kl import categorical_kl
from src.core.natural_gradient import conjugate_gradient, step_length


class Counted:
    """v -> A v, counting how often it is asked."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.calls = matrix, 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix @ vector


def positive_definite(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random one with eigenvalues between 1/2 and some tens, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return root @ root.T + 0.5 * torch.eye(size), torch.randn(size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_solves_in_as_many_steps_as_there_are_unknowns(size: int, seed: int) -> None:
    matrix, target = positive_definite(size, seed)
    product = Counted(matrix)
    solution = conjugate_gradient(product, target, iterations=size, tolerance=0.0)
    # the residual of N steps is rounding, enlarged by a condition number of up to 100
    assert_close(solution, torch.linalg.solve(matrix, target), rtol=1e-5, atol=1e-6)
    assert product.calls <= size


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 5])
def test_each_step_minimizes_over_one_more_direction(iterations: int) -> None:
    """x_k is least in x A x / 2 - b x over the span of b, A b, ..., A^(k-1) b: solved there directly."""
    matrix, target = positive_definite(6, 7)
    krylov = [target]
    for _ in range(iterations - 1):
        krylov.append(matrix @ krylov[-1])
    basis = torch.linalg.qr(torch.stack(krylov[:iterations], dim=1))[0] if iterations else torch.zeros(6, 1).double()
    small = torch.linalg.lstsq(basis.T @ matrix @ basis, basis.T @ target.unsqueeze(1)).solution
    expected = (basis @ small).squeeze(1) if iterations else torch.zeros_like(target)
    product = Counted(matrix)
    assert_close(conjugate_gradient(product, target, iterations, tolerance=0.0), expected)
    assert product.calls == iterations


@pytest.mark.parametrize("eigenvalues", [1, 2, 3])
def test_stops_as_soon_as_it_is_there(eigenvalues: int) -> None:
    """With k different eigenvalues k steps are exact; the seven others allowed are not taken."""
    diagonal = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[torch.arange(10) % eigenvalues]
    product, target = Counted(torch.diag(diagonal)), torch.linspace(1, 2, 10, dtype=torch.float64)
    assert_close(conjugate_gradient(product, target, 10), target / diagonal)
    assert product.calls == eigenvalues


def test_a_tolerance_is_relative_to_the_target() -> None:
    """|A x - b|^2 <= tolerance |b|^2 at the first step for which it holds, in any unit of b."""
    matrix, target = positive_definite(12, 3)
    for unit in (1e-8, 1.0, 1e8):
        product = Counted(matrix)
        residual = matrix @ conjugate_gradient(product, unit * target, 12, tolerance=1e-2) - unit * target
        assert residual.square().sum() <= 1e-2 * (unit * target).square().sum()
        before = matrix @ conjugate_gradient(Counted(matrix), unit * target, product.calls - 1, 0.0) - unit * target
        assert before.square().sum() > 1e-2 * (unit * target).square().sum()
        assert 1 < product.calls < 12


def test_nothing_to_solve_for() -> None:
    """Checklist 12. A zero gradient has a zero direction, and the Fisher matrix is not asked."""
    product = Counted(torch.eye(4))
    assert_close(conjugate_gradient(product, torch.zeros(4), 10), torch.zeros(4))
    assert product.calls == 0


@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 2.0])
def test_the_step_spends_the_kl_of_the_quadratic_model(max_kl: float) -> None:
    """1/2 (a x)^T F (a x) = max_kl for any x that has curvature."""
    matrix, x = positive_definite(5, 4)
    step = step_length(x @ matrix @ x, max_kl) * x
    assert_close(0.5 * step @ matrix @ step, torch.tensor(max_kl, dtype=torch.float64))


@pytest.mark.parametrize("curvature", [0.0, -1e-3, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_step_where_there_is_no_curvature(curvature: float, dtype: torch.dtype) -> None:
    """Nowhere to go is no reason to go infinitely far."""
    length = step_length(torch.tensor(curvature, dtype=dtype), 0.01)
    assert length.item() == 0.0
    assert length.dtype == dtype


def test_a_natural_step_moves_a_softmax_by_the_kl_it_is_given() -> None:
    """Through the real KL, whose second derivative is the Fisher matrix diag(p) - p p^T; up to the third order."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    gradient = torch.tensor([1.0, -0.5, -0.7, 0.2], dtype=torch.float64)  # sums to 0: in the range of F
    p = logits.softmax(0)
    fisher = torch.diag(p) - torch.outer(p, p)
    direction = conjugate_gradient(lambda v: fisher @ v, gradient, 4)
    step = step_length(direction @ fisher @ direction, 1e-6) * direction
    kl = categorical_kl(logits.log_softmax(0), (logits + step).log_softmax(0)).item()
    assert kl == pytest.approx(1e-6, rel=5e-3)
    assert_close(fisher @ direction, gradient)


@pytest.mark.parametrize("curvature", [1e-6, 0.5, 2.0])
def test_any_curvature_above_0_is_used(curvature: float) -> None:
    """sqrt(2 max_kl / curvature), from flat to steep."""
    length = step_length(torch.tensor(curvature, dtype=torch.float64), 0.01)
    assert length.item() == pytest.approx((0.02 / curvature) ** 0.5)
