"""The critic's losses, plain and clipped."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from src.core.value_losses import ClippedSquaredError, SquaredError, clipped_squared_error, squared_error
from src.errors import SettingError

CLIP = 0.5
ONE = torch.ones(1, 1, dtype=torch.bool)

number = st.floats(-5, 5)


def scalar(x: float, requires_grad: bool = False) -> Tensor:
    return torch.tensor([[x]], dtype=torch.float64, requires_grad=requires_grad)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    values, old_values, returns = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return values, old_values, returns


@pytest.fixture
def mask() -> Tensor:
    return torch.arange(6) < torch.tensor([[6], [3], [1], [0]])


def test_squared_error_is_half_the_mse(batch: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> None:
    """Checklist 45. Half of torch's own, per token, and 0 outside the mask; its gradient is V - R."""
    values, _, returns = batch
    values.requires_grad_()
    losses = squared_error(values, returns, mask)
    assert_close(losses, 0.5 * torch.nn.functional.mse_loss(values, returns, reduction="none") * mask)
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    assert_close(gradient, (values.detach() - returns) * mask)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(number, number, number, st.floats(0.01, 3))
def test_clipped_squared_error_by_definition(value: float, old: float, target: float, clip: float) -> None:
    """Checklist 45. 0.5 max(unclipped, clipped), clipped around the *old* value."""
    near_old = min(max(value, old - clip), old + clip)
    losses, _ = clipped_squared_error(scalar(value), scalar(old), scalar(target), ONE, clip)
    assert losses.item() == pytest.approx(0.5 * max((value - target) ** 2, (near_old - target) ** 2), abs=1e-12)


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "clipped"),
    [
        pytest.param(0.3, 2.0, 0.5 * 1.7**2, -1.7, 0.0, id="moved-little"),
        pytest.param(1.0, 2.0, 0.5 * 1.5**2, 0.0, 1.0, id="moved-too-far-toward-the-target"),
        pytest.param(-1.0, 2.0, 0.5 * 3.0**2, -3.0, 0.0, id="moved-far-away-from-the-target"),
        pytest.param(1.0, -2.0, 0.5 * 3.0**2, 3.0, 0.0, id="moved-far-away-on-the-other-side"),
        pytest.param(-1.0, -2.0, 0.5 * 1.5**2, 0.0, 1.0, id="moved-too-far-down-toward-the-target"),
    ],
)
def test_value_clipping_case_by_case(value: float, target: float, loss: float, gradient: float, clipped: float) -> None:
    """Checklist 45. From an old value of 0: nothing is gained by moving more than 0.5 toward the target."""
    values = scalar(value, requires_grad=True)
    losses, indicator = clipped_squared_error(values, scalar(0.0), scalar(target), ONE, CLIP)
    (actual,) = torch.autograd.grad(losses.sum(), values)
    assert losses.item() == pytest.approx(loss)
    assert actual.item() == pytest.approx(gradient)
    assert indicator.item() == clipped


def test_at_the_old_values_clipping_is_absent(batch: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> None:
    """Checklist 45. Value and gradient are those of the plain loss."""
    values, _, returns = batch
    values.requires_grad_()
    losses, indicator = clipped_squared_error(values, values.detach(), returns, mask, CLIP)
    plain = squared_error(values, returns, mask)
    assert_close(losses, plain)
    assert_close(torch.autograd.grad(losses.sum(), values), torch.autograd.grad(plain.sum(), values))
    assert indicator.eq(0).all()


def test_a_wide_clip_is_none(batch: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> None:
    """Checklist 45."""
    values, old_values, returns = batch
    losses, indicator = clipped_squared_error(values, old_values, returns, mask, 1e6)
    assert_close(losses, squared_error(values, returns, mask))
    assert indicator.eq(0).all()


def test_rounding_is_no_clipping() -> None:
    """Checklist 45. old + (V - old) need not be V to the last bit; nothing is clipped all the same."""
    old, values, returns = torch.randn(3, 100, 10, generator=torch.Generator().manual_seed(0)) * 0.1
    losses, indicator = clipped_squared_error(values, old, returns, torch.ones(100, 10, dtype=torch.bool), 1e3)
    assert (old + (values - old) != values).any()
    assert_close(losses, 0.5 * (values - returns) ** 2)
    assert indicator.eq(0).all()


def test_objects_apply_their_functions(batch: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> None:
    """Checklist 45. Clip off is the plain loss whatever the old values; clip on is the clipped one."""
    values, old_values, returns = batch
    losses, indicator = SquaredError()(values, old_values, returns, mask)
    assert_close(losses, 0.5 * (values - returns) ** 2 * mask)
    assert_close(indicator, torch.zeros_like(losses))
    clipped = ClippedSquaredError(value_clip=0.2)(values, old_values, returns, mask)
    assert_close(clipped, clipped_squared_error(values, old_values, returns, mask, 0.2))
    assert clipped[1].sum() > 0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_an_empty_range_is_refused(value: float) -> None:
    with pytest.raises(SettingError) as error:
        ClippedSquaredError(value_clip=value)
    assert error.value.name == "value_clip"
    for part in ("value_clip", "greater than 0", repr(value)):
        assert part in str(error.value)
