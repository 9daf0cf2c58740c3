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

from src.core.kl import ExactKL, SampledKL, categorical_kl, k1, k2, k3
from src.core.logprobs import normalized_logits

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


def test_sampled_and_exact_agree_in_the_mean(p_logits: Tensor, q: Tensor) -> None:
    """Checklist 28. 200 000 samples of p: the mean of k1 and of k3 within five standard errors of the exact KL."""
    p = p_logits.detach().log_softmax(0)
    samples = torch.multinomial(p.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    p_a, q_a = p[samples].unsqueeze(0), q[samples].unsqueeze(0)
    exact = categorical_kl(p, q)
    assert ExactKL()(p_a, q_a, lambda: exact.expand(1, 200_000)).eq(exact).all()
    for estimator in (k1, k3):
        estimates = SampledKL(estimator)(p_a, q_a, lambda: torch.tensor(math.nan))
        assert (estimates.mean() - exact).abs() < 5 * estimates.std() / 200_000**0.5
    biased = SampledKL(k2)(p_a, q_a, lambda: torch.tensor(math.nan))
    assert (biased.mean() - exact).abs() > 5 * biased.std() / 200_000**0.5  # so the bound can be missed


@pytest.fixture
def log_p() -> Tensor:
    return torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)


@pytest.fixture
def log_q() -> Tensor:
    return torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log_softmax(-1)


def test_categorical_kl_is_that_of_torch(log_p: Tensor, log_q: Tensor) -> None:
    """Checklist 28. One number per token, in the direction that is written: KL(p || q) is not KL(q || p)."""
    forward = kl_divergence(Categorical(logits=log_p), Categorical(logits=log_q))
    assert_close(categorical_kl(log_p, log_q), forward)
    reverse = categorical_kl(log_q, log_p)
    assert_close(reverse, kl_divergence(Categorical(logits=log_q), Categorical(logits=log_p)))
    assert (forward - reverse).abs().min() > 1e-3
    assert_close(categorical_kl(log_p, log_p), torch.zeros(3, 2, dtype=torch.float64))


def test_categorical_kl_by_hand() -> None:
    """Checklist 57. p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = log(2 / sqrt 3), KL(q || p) = 3/4 log 3 - log 2."""
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    q = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    assert categorical_kl(p, q).item() == pytest.approx(math.log(2) - 0.5 * math.log(3))
    assert categorical_kl(q, p).item() == pytest.approx(0.75 * math.log(3) - math.log(2))


def test_gradient_of_the_categorical_kl_on_both_sides(p_logits: Tensor, q: Tensor) -> None:
    """Checklist 29 and 57. On the logits of q: q - p. On those of p: p_v (log p_v - log q_v - KL)."""
    q_logits = q.clone().requires_grad_()
    kl = categorical_kl(p_logits.log_softmax(0), q_logits.log_softmax(0))
    on_p, on_q = torch.autograd.grad(kl, (p_logits, q_logits))
    p = p_logits.detach().log_softmax(0)
    assert_close(on_q, q.exp() - p.exp())
    assert_close(on_p, p.exp() * (p - q - kl.detach()))


@pytest.mark.parametrize("q_forbids_it_too", [False, True])
def test_a_token_that_p_forbids_adds_nothing(q_forbids_it_too: bool) -> None:
    """A logit of -inf: the KL is that of the other tokens, and its gradient on them too; on itself it is 0."""
    forbidden = -math.inf
    p_logits = torch.tensor([0.5, -1.0, forbidden, 2.0], dtype=torch.float64, requires_grad=True)
    q_logits = torch.tensor([1.0, 0.3, forbidden if q_forbids_it_too else 0.2, -0.5], dtype=torch.float64)
    q_logits.requires_grad_()
    log_q = normalized_logits(q_logits)
    kl = categorical_kl(normalized_logits(p_logits), log_q)
    rest = torch.tensor([0, 1, 3])
    p = p_logits.detach()[rest].log_softmax(0)
    expected = (p.exp() * (p - log_q.detach()[rest])).sum()
    assert_close(kl.detach(), expected)
    on_p, on_q = torch.autograd.grad(kl, (p_logits, q_logits))
    whole = torch.zeros(4, dtype=torch.float64)
    assert_close(on_p, whole.index_put((rest,), p.exp() * (p - log_q.detach()[rest] - expected)))
    assert_close(on_q, log_q.detach().exp() - whole.index_put((rest,), p.exp()))


def test_a_token_that_only_q_forbids_is_infinitely_far() -> None:
    """KL(p || q) = inf where p may do what q may not; the sampled estimate says so at that token."""
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).log()
    assert categorical_kl(p, q).item() == math.inf
    assert k1(p, q)[1].item() == math.inf


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_the_sampled_form_looks_at_samples_the_exact_form_at_distributions(estimator: Estimator) -> None:
    """The other's argument is not touched; two distributions at the price of one would be paid for nothing."""

    def never() -> Tensor:
        raise AssertionError("the samples suffice")

    logprobs, other = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -0.5]])
    assert_close(SampledKL(estimator)(logprobs, other, never), estimator(logprobs, other))
    assert_close(ExactKL()(logprobs, other, lambda: torch.tensor([[7.0, 8.0]])), torch.tensor([[7.0, 8.0]]))
