"""Whether gradients will be differentiated again."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from src.utils.double_backward import is_twice_differentiable, twice_differentiable


def test_it_holds_inside_alone_and_ends_with_an_error() -> None:
    assert not is_twice_differentiable()
    with twice_differentiable():
        with twice_differentiable():
            assert is_twice_differentiable()
        assert is_twice_differentiable()
    with pytest.raises(ZeroDivisionError), twice_differentiable():
        _ = 1 / 0
    assert not is_twice_differentiable()


def test_attention_can_be_differentiated_twice_inside() -> None:
    """By comparison with differences of gradients; outside, PyTorch takes a way that refuses it."""
    query, key, value = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64).unbind()
    query.requires_grad_(True)

    def slope(at: torch.Tensor) -> torch.Tensor:
        result = scaled_dot_product_attention(at, key, value, is_causal=True)
        return torch.autograd.grad(result.square().sum(), [at], create_graph=True)[0]

    direction = torch.randn_like(query)
    with twice_differentiable():
        (found,) = torch.autograd.grad((slope(query) * direction).sum(), [query])
        step = 1e-6 * direction
        ahead, behind = slope(query + step), slope(query - step)
    assert torch.allclose(found, ((ahead - behind) / 2e-6).detach(), atol=1e-7)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad((slope(query) * direction).sum(), [query])
