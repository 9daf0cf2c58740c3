"""The unclipped losses and CISPO, and what all losses agree on: the policy gradient at the old policy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from src.core.aggregation import token_mean, weighted_sum
from src.core.kl import k1, k2, k3
from src.core.policy_losses import (
    ClippedSurrogate,
    ClippedWeight,
    DualClippedSurrogate,
    Reinforce,
    SequenceClippedSurrogate,
    Surrogate,
    clipped_surrogate,
    clipped_weight,
    reinforce,
    surrogate,
)
from src.errors import SettingError

LOW, HIGH = 0.2, 0.3
LOSSES = {
    "reinforce": Reinforce(),
    "surrogate": Surrogate(),
    "clip": ClippedSurrogate(LOW, HIGH),
    "dual_clip": DualClippedSurrogate(LOW, HIGH, 3.0),
    "sequence_clip": SequenceClippedSurrogate(LOW, HIGH),
    "clipped_weight": ClippedWeight(1.0, HIGH),
}

quick = settings(deadline=None, derandomize=True, max_examples=100)
ratios, advantages_, logprobs_ = st.floats(0.01, 100), st.floats(-5, 5), st.floats(-9, -0.01)


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 6, dtype=torch.float64, generator=generator, requires_grad=True)


@pytest.fixture
def logprobs(logits: Tensor) -> Tensor:
    ids = torch.randint(0, 6, (3, 5), generator=torch.Generator().manual_seed(1))
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


@pytest.fixture
def advantages() -> Tensor:
    return torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mask() -> Tensor:
    return torch.arange(5) < torch.tensor([[5], [2], [0]])


def one_token(loss_function: Any, ratio: float, advantage: float, logprob: float, *settings: float) -> Any:
    """Loss, gradient with respect to log pi(a), and indicators of a token whose probability has changed by `ratio`."""
    logprobs = torch.tensor([[logprob]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[logprob - math.log(ratio)]], dtype=torch.float64)
    credit, mask = torch.tensor([[advantage]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss, indicators = loss_function(logprobs, old, credit, mask, *settings)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return loss.item(), gradient.item(), {name: x.item() for name, x in indicators.items()}


@pytest.mark.parametrize("name", LOSSES)
def test_all_losses_have_the_same_gradient_at_the_old_policy(
    name: str, logits: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> None:
    """Checklist 43. -A grad log pi through the logits, nothing clipped, whatever the loss is called."""
    losses, indicators = LOSSES[name](logprobs, logprobs.detach(), advantages, mask)
    actual, expected = (
        torch.autograd.grad(weighted_sum(x, token_mean(mask), mask), logits, retain_graph=True)[0]
        for x in (losses, -(advantages * logprobs))
    )
    assert_close(actual, expected)
    assert actual.ne(0).any()
    assert all(x.eq(0).all() for x in indicators.values())


@pytest.mark.parametrize("kl", [k1, k2, k3])
def test_the_kl_penalty_has_no_gradient_at_the_old_policy(
    kl: Any, logits: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> None:
    """Checklist 57. KL(old || new) is least at new = old: k2 and k3 add nothing there, sample by sample; k1 does."""
    loss, _ = surrogate(logprobs, logprobs.detach(), advantages, mask)
    penalized = loss + 0.7 * kl(logprobs.detach(), logprobs)
    with_penalty, without = (
        torch.autograd.grad(weighted_sum(x, token_mean(mask), mask), logits, retain_graph=True)[0]
        for x in (penalized, loss)
    )
    assert torch.allclose(with_penalty, without, rtol=1e-7, atol=1e-12) == (kl is not k1)


@pytest.mark.parametrize("kl", [k1, k3])
def test_the_penalty_pulls_back_to_the_old_policy(kl: Any) -> None:
    """Checklist 57. E_old[grad k(old, new)] = grad KL(old || new) = pi_new - pi_old on the logits, exactly."""
    new = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([1.0, 0.3, -0.5, 0.2], dtype=torch.float64).log_softmax(0)
    (gradient,) = torch.autograd.grad((old.exp() * kl(old, new.log_softmax(0))).sum(), new)
    assert_close(gradient, new.detach().softmax(0) - old.exp())


@quick
@given(ratio=ratios, advantage=advantages_, logprob=logprobs_)
def test_reinforce_by_definition(ratio: float, advantage: float, logprob: float) -> None:
    """-A log pi and its slope -A, wherever the old policy was."""
    loss, gradient, indicators = one_token(reinforce, ratio, advantage, logprob)
    assert (loss, gradient, indicators) == (pytest.approx(-advantage * logprob), pytest.approx(-advantage), {})


@quick
@given(ratio=ratios, advantage=advantages_, logprob=logprobs_)
def test_surrogate_by_definition(ratio: float, advantage: float, logprob: float) -> None:
    """-rho A, which is also its slope; the clipped one is the same inside the bounds and never less."""
    loss, gradient, indicators = one_token(surrogate, ratio, advantage, logprob)
    assert (loss, gradient, indicators) == (
        pytest.approx(-ratio * advantage), pytest.approx(-ratio * advantage), {},
    )  # fmt: skip
    clipped, _, _ = one_token(clipped_surrogate, ratio, advantage, logprob, LOW, HIGH)
    assert clipped == pytest.approx(loss) if 1 - LOW < ratio < 1 + HIGH else clipped >= loss - 1e-9


@quick
@given(ratio=ratios, advantage=advantages_, logprob=logprobs_)
def test_clipped_weight_by_definition(ratio: float, advantage: float, logprob: float) -> None:
    """-clip(rho) A log pi; the weight is a constant, so the slope is -clip(rho) A and never 0 for being clipped."""
    weight = min(max(ratio, 1 - LOW), 1 + HIGH)
    loss, gradient, indicators = one_token(clipped_weight, ratio, advantage, logprob, LOW, HIGH)
    assert loss == pytest.approx(-weight * advantage * logprob)
    assert gradient == pytest.approx(-weight * advantage)
    if min(abs(ratio - 1 + LOW), abs(ratio - 1 - HIGH)) > 1e-9:  # at the very edge rounding decides
        assert indicators == {"clip_fraction": float(not 1 - LOW <= ratio <= 1 + HIGH)}


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "weight"), [(0.1, 0.8), (0.9, 0.9), (1.25, 1.25), (4.0, 1.3)])
def test_a_token_that_ppo_clips_still_learns(advantage: float, ratio: float, weight: float) -> None:
    """Checklist 43. The sign does not matter to CISPO; of PPO's four cases it keeps all."""
    _, gradient, _ = one_token(clipped_weight, ratio, advantage, -1.5, LOW, HIGH)
    assert gradient == pytest.approx(-weight * advantage)


def test_a_clipped_weight_without_bounds_has_the_gradient_of_the_surrogate() -> None:
    """sg[rho] grad log pi = grad rho: the two differ in value only."""
    for ratio in (0.05, 0.9, 7.0):
        _, free, indicators = one_token(clipped_weight, ratio, -1.7, -2.0, 1.0, 1e6)
        assert free == pytest.approx(one_token(surrogate, ratio, -1.7, -2.0)[1])
        assert indicators == {"clip_fraction": 0.0}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("log_ratio", [-1000.0, -60.0, 60.0, 1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_runaway_ratio_stays_finite(name: str, log_ratio: float, advantage: float) -> None:
    """Checklist 46. Loss and gradient in float32, which overflows at exp(89)."""
    old = torch.tensor([[-1.0, -1.0]])
    logprobs = (old + log_ratio).requires_grad_()
    losses, _ = LOSSES[name](logprobs, old, torch.full((1, 2), advantage), torch.ones(1, 2, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


def test_the_reported_kl_is_not_clamped() -> None:
    """Checklist 46. The ratio stops at +-20, the estimators go on: a policy that has run away must be seen to."""
    d = torch.tensor([[-30.0, 40.0]], dtype=torch.float64)
    nothing = torch.zeros_like(d)
    assert_close(k1(d, nothing), d)
    assert_close(k2(d, nothing), torch.tensor([[450.0, 800.0]], dtype=torch.float64))
    k3_by_hand = torch.tensor([[math.exp(30) - 1 - 30, math.exp(-40) - 1 + 40]], dtype=torch.float64)
    assert_close(k3(d, nothing), k3_by_hand)


@pytest.mark.parametrize(
    ("loss", "function", "settings"),
    [
        (Reinforce, reinforce, {}),
        (Surrogate, surrogate, {}),
        (ClippedWeight, clipped_weight, {"clip_low": LOW, "clip_high": HIGH}),
    ],
)
def test_objects_apply_their_functions(
    loss: Any, function: Any, settings: dict[str, float], advantages: Tensor, mask: Tensor
) -> None:
    """The frozen object is the pure function with its settings held."""
    logprobs, old = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    actual, expected = (
        loss(**settings)(logprobs, old, advantages, mask),
        function(logprobs, old, advantages, mask, **settings),
    )
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])
    assert all(x.sum() > 0 for x in actual[1].values())


@pytest.mark.parametrize(
    ("name", "value"), [("clip_low", 0.0), ("clip_low", 1.01), ("clip_low", math.nan), ("clip_high", 0.0)]
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    """A lower bound of 1 is none, as in the paper; beyond it weights would turn their sign."""
    assert ClippedWeight(clip_low=1.0, clip_high=0.2).clip_low == 1.0
    with pytest.raises(SettingError, match=name):
        ClippedWeight(**({"clip_low": LOW, "clip_high": HIGH} | {name: value}))


@pytest.mark.parametrize(
    ("low", "high", "name", "value"), [(1.5, 0.2, "clip_low", 1.5), (0.5, -1.0, "clip_high", -1.0)]
)
def test_a_range_of_weights_that_cannot_be_is_refused(low: float, high: float, name: str, value: float) -> None:
    """Named with the value that was given."""
    with pytest.raises(SettingError) as error:
        ClippedWeight(clip_low=low, clip_high=high)
    assert (error.value.name, error.value.value) == (name, value)
