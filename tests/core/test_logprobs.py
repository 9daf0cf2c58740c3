"""Log-probabilities and entropies against torch.distributions, closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.testing import assert_close

from src.core.logprobs import entropy_from_logits, logprobs_from_logits, normalized_logits

VOCABULARY = 5
temperatures = pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(2, 4, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[0, 4, 2, 1], [3, 3, 0, 4]])


@temperatures
def test_logprobs_are_those_of_the_tempered_categorical(logits: Tensor, ids: Tensor, temperature: float) -> None:
    """Checklist 14. pi_T(a) = p(a)^(1/T) / sum_v p(v)^(1/T)."""
    tempered = logits.softmax(-1) ** (1 / temperature)
    tempered = tempered / tempered.sum(-1, keepdim=True)
    assert_close(logprobs_from_logits(logits, ids, temperature), Categorical(probs=tempered).log_prob(ids))


@temperatures
def test_entropy_is_that_of_the_tempered_categorical(logits: Tensor, temperature: float) -> None:
    """Checklist 53 and Checklist 14."""
    assert_close(entropy_from_logits(logits, temperature), Categorical(logits=logits / temperature).entropy())


def test_temperature_is_one_unless_given(logits: Tensor, ids: Tensor) -> None:
    assert_close(logprobs_from_logits(logits, ids), Categorical(logits=logits).log_prob(ids))
    assert_close(entropy_from_logits(logits), Categorical(logits=logits).entropy())


def test_entropy_is_the_mean_surprise(logits: Tensor) -> None:
    """Checklist 53. One function reduced to the other, by exact enumeration: H = -sum_a pi(a) log pi(a)."""
    every_id = torch.arange(VOCABULARY).expand(logits.shape)
    surprise = -logprobs_from_logits(logits.unsqueeze(-2).expand(*logits.shape, VOCABULARY), every_id, 0.7)
    assert_close((-surprise).exp().sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert_close(entropy_from_logits(logits, 0.7), ((-surprise).exp() * surprise).sum(-1))


def test_extremes_of_the_entropy() -> None:
    """Checklist 53. log V for the uniform one, 0 for a certain one."""
    logits = torch.tensor([[2.0] * VOCABULARY, [1000.0] + [0.0] * (VOCABULARY - 1)])
    assert_close(entropy_from_logits(logits), torch.tensor([math.log(VOCABULARY), 0.0]))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_an_offset_of_the_logits_changes_nothing(logits: Tensor, ids: Tensor, offset: float) -> None:
    """exp(1e4) overflows even in float64: only the stable form passes."""
    assert_close(logprobs_from_logits(logits + offset, ids), logprobs_from_logits(logits, ids))
    assert_close(entropy_from_logits(logits + offset), entropy_from_logits(logits))


@temperatures
def test_closed_form_gradients(logits: Tensor, ids: Tensor, temperature: float) -> None:
    """Checklist 53 and Checklist 14. d log pi(a)/dz_v = ([v = a] - pi_v)/T; dH/dz_v = -pi_v (log pi_v + H)/T."""
    logits.requires_grad_()
    policy = (logits / temperature).softmax(-1).detach()
    (gradient,) = torch.autograd.grad(logprobs_from_logits(logits, ids, temperature).sum(), logits)
    assert_close(gradient, (torch.nn.functional.one_hot(ids, VOCABULARY) - policy) / temperature)
    (gradient,) = torch.autograd.grad(entropy_from_logits(logits, temperature).sum(), logits)
    entropy = -(policy * policy.log()).sum(-1, keepdim=True)
    assert_close(gradient, -policy * (policy.log() + entropy) / temperature)


def test_gradients_against_finite_differences(logits: Tensor, ids: Tensor) -> None:
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: logprobs_from_logits(z, ids, 0.7), logits)
    assert torch.autograd.gradcheck(lambda z: entropy_from_logits(z, 0.7), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_to_float32(logits: Tensor, ids: Tensor, dtype: torch.dtype) -> None:
    """Checklist 58. As if the rounded logits had come in float64; computed in half precision they miss by 1e-2."""
    half = logits.to(dtype)
    logprobs, entropies = logprobs_from_logits(half, ids, 0.7), entropy_from_logits(half, 0.7)
    assert logprobs.dtype == entropies.dtype == torch.float32
    exact = Categorical(logits=half.double() / 0.7)
    assert_close(logprobs, exact.log_prob(ids).float())
    assert_close(entropies, exact.entropy().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_stays_as_it_is(logits: Tensor, ids: Tensor, dtype: torch.dtype) -> None:
    """Checklist 58."""
    assert logprobs_from_logits(logits.to(dtype), ids).dtype == dtype
    assert entropy_from_logits(logits.to(dtype)).dtype == dtype


@temperatures
def test_normalized_logits_hold_the_logprob_of_every_token(logits: Tensor, ids: Tensor, temperature: float) -> None:
    """Checklist 14. Those of the tempered categorical; that of the token taken is `logprobs_from_logits`."""
    every = normalized_logits(logits, temperature)
    assert_close(every, Categorical(logits=logits / temperature).logits)
    assert_close(every.gather(-1, ids.unsqueeze(-1)).squeeze(-1), logprobs_from_logits(logits, ids, temperature))
    assert_close(every.logsumexp(-1), torch.zeros(2, 4, dtype=torch.float64))


def test_normalized_logits_are_normalized_in_float32_or_better(logits: Tensor) -> None:
    """Checklist 58. Half precision is raised before, not after; a forbidden token keeps probability 0."""
    half = logits.bfloat16()
    assert_close(normalized_logits(half, 0.7), Categorical(logits=half.double() / 0.7).logits.float())
    assert normalized_logits(logits).dtype == torch.float64
    forbidden = logits.masked_fill(torch.arange(VOCABULARY).eq(2), -math.inf)
    assert normalized_logits(forbidden)[..., 2].eq(-math.inf).all()
    assert_close(normalized_logits(forbidden).exp().sum(-1), torch.ones(2, 4, dtype=torch.float64))
