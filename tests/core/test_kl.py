"""The three estimators of the KL, checked by exact enumeration over a small categorical."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from src.core.kl import k1, k2, k3

Estimator = Callable[[Tensor, Tensor], Tensor]
Form = Callable[[float], float]

quick = settings(deadline=None, derandomize=True, max_examples=60)
logprob = st.floats(-12, 0)


@pytest.fixture
def p_logits() -> Tensor:
    return torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)


@pytest.fixture
def q() -> Tensor:
    """Log-probabilities of the other distribution."""
    return torch.tensor([1.0, 0.3, -0.5, 0.2], dtype=torch.float64).log_softmax(0)


@pytest.mark.parametrize(
    ("estimator", "form"),
    [(k1, lambda d: d), (k2, lambda d: d * d / 2), (k3, lambda d: math.exp(-d) - 1 + d)],
    ids=["k1", "k2", "k3"],
)
@quick
@given(p=logprob, q=logprob)
def test_closed_forms(estimator: Estimator, form: Form, p: float, q: float) -> None:
    """Checklist 28. d = log p - log q, in that order."""
    actual = estimator(torch.tensor([[p]], dtype=torch.float64), torch.tensor([[q]], dtype=torch.float64))
    assert actual.item() == pytest.approx(form(p - q), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("estimator", [k2, k3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_never_negative_even_in_float32(estimator: Estimator, sign: int) -> None:
    """Checklist 28. Written with exp, k3 of a tiny difference comes out below 0 in float32."""
    difference = sign * torch.logspace(-12, 1, 20_000)
    assert estimator(difference, torch.zeros_like(difference)).min() >= 0


def test_k3_keeps_its_digits_near_zero() -> None:
    """Checklist 28. There k3 = d^2/2 - d^3/6 + ..., which exp(-d) - 1 + d would round away."""
    d = torch.tensor([1e-7, -1e-7], dtype=torch.float64)
    assert_close(k3(d, torch.zeros_like(d)), d**2 / 2 - d**3 / 6, rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_expectation_is_the_kl(estimator: Estimator, p_logits: Tensor, q: Tensor) -> None:
    """Checklist 28. E_p[k1] = E_p[k3] = KL(p || q), exactly."""
    p = p_logits.log_softmax(0)
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    assert_close((p.exp() * estimator(p, q)).sum(), expected)


def test_k2_is_biased(p_logits: Tensor, q: Tensor) -> None:
    p = p_logits.log_softmax(0)
    exact = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    assert (p.exp() * k2(p, q)).sum().item() != pytest.approx(exact.item(), rel=0.05)


def test_expected_gradients_inside_a_loss(p_logits: Tensor, q: Tensor) -> None:
    """Checklist 29. E_p[grad k1] = 0, E_p[grad k2] = grad KL(p || q), E_p[grad k3] = grad KL(q || p)."""
    p = p_logits.log_softmax(0)
    weights = p.detach().exp()  # samples are drawn, not differentiated through

    def gradient(scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, p_logits, retain_graph=True)[0]

    forward = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    reverse = kl_divergence(Categorical(logits=q), Categorical(logits=p))
    assert_close(gradient((weights * k1(p, q)).sum()), torch.zeros(4, dtype=torch.float64))
    assert_close(gradient((weights * k2(p, q)).sum()), gradient(forward))
    assert_close(gradient((weights * k3(p, q)).sum()), gradient(reverse))


def test_sum_of_k1_is_the_log_ratio_of_the_sequences() -> None:
    """KL over a sequence is a sum over its tokens: log prod p - log prod q."""
    p, q = torch.tensor([[0.5, 0.2, 0.9]], dtype=torch.float64), torch.tensor([[0.4, 0.4, 0.3]], dtype=torch.float64)
    assert_close(k1(p.log(), q.log()).sum(-1), (p.prod(-1) / q.prod(-1)).log())
