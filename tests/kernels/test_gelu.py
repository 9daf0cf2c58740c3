"""GPT-2's activation against its formula, and its derivative against that of the formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.kernels import gelu as activation
from src.kernels.gelu import gelu_tanh


def formula(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.fixture(params=[7, 2**16], ids=["pieces", "whole"], autouse=True)
def in_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "IN_CACHE", request.param)


def test_value_and_derivative_are_those_of_the_formula() -> None:
    """Far out as well, where the exponential leaves its range; the input's columns do not lie side by side."""
    x = torch.cat([torch.linspace(-9, 9, 1001), torch.tensor([-1e4, 1e4, 0.0, -0.0, 40.0])]).double()
    x = torch.stack([x, x.flip(0)]).t().requires_grad_()
    assert not x.is_contiguous()
    above = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    found, wanted = gelu_tanh(x), formula(x)
    assert_close(found, wanted, atol=1e-13, rtol=1e-13)
    slopes = [torch.autograd.grad(y, x, above)[0] for y in (found, wanted)]
    assert_close(*slopes, atol=1e-12, rtol=1e-12)
    assert_close(gelu_tanh(x.detach()), found, atol=0, rtol=0)


def test_half_precision_rounds_only_what_is_handed_on() -> None:
    x = torch.linspace(-9, 9, 1001).bfloat16()
    wide = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(formula(wide).sum(), wide)
    own = x.clone().requires_grad_()
    y = gelu_tanh(own)
    (found,) = torch.autograd.grad(y.sum(), own)
    assert y.dtype == found.dtype == torch.bfloat16
    for a, b in ((y, formula(wide)), (found, slope)):
        assert_close(a.double(), b, atol=1e-6, rtol=2**-8)


def test_a_second_derivative_is_refused() -> None:
    x = torch.ones(3, requires_grad=True)
    (slope,) = torch.autograd.grad((gelu_tanh(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()
