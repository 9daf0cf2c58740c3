"""The clipped surrogate, once and twice clipped, case by case."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from src.core.policy_losses import (
    MAX_LOG_RATIO,
    ClippedSurrogate,
    DualClippedSurrogate,
    clipped_surrogate,
    dual_clipped_surrogate,
    probability_ratio,
)
from src.errors import SettingError

LOW, HIGH, DUAL = 0.2, 0.3, 3.0
CLIP = {"clip_low": LOW, "clip_high": HIGH}
DUAL_CLIP = {**CLIP, "dual_clip": DUAL}

quick = settings(deadline=None, derandomize=True, max_examples=100)
ratios = st.floats(0.01, 100)
advantages_ = st.floats(-5, 5)


@dataclass(frozen=True)
class Outcome:
    """What a loss makes of one token."""

    loss: float
    gradient: float  # with respect to log pi(a)
    indicators: dict[str, float]


def one_token(loss_function: Any, ratio: float, advantage: float, **settings: float) -> Outcome:
    """Loss and gradient of a single token whose probability has changed by `ratio`."""
    old = torch.tensor([[-1.5]], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, indicators = loss_function(logprobs, old, torch.tensor([[advantage]], dtype=torch.float64), mask, **settings)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return Outcome(loss.item(), gradient.item(), {name: x.item() for name, x in indicators.items()})


# d(-rho A)/d log pi = -rho A: wherever the token is not clipped the slope equals the loss
SIGN_CASES = [
    pytest.param(2.0, 0.5, -1.0, True, id="good-action-below"),
    pytest.param(2.0, 1.0, -2.0, True, id="good-action-inside"),
    pytest.param(2.0, 1.25, -2.5, True, id="good-action-inside-the-wider-upper-side"),
    pytest.param(2.0, 1.6, -2.0 * (1 + HIGH), False, id="good-action-above"),
    pytest.param(-2.0, 0.5, 2.0 * (1 - LOW), False, id="bad-action-below"),
    pytest.param(-2.0, 1.0, 2.0, True, id="bad-action-inside"),
    pytest.param(-2.0, 1.6, 3.2, True, id="bad-action-above"),
]


@pytest.mark.parametrize(("advantage", "ratio", "loss", "learns"), SIGN_CASES)
def test_clipping_by_sign_and_side(advantage: float, ratio: float, loss: float, learns: bool) -> None:
    """Checklist 43. Clipped only where moving further would be rewarded; there the gradient is 0."""
    outcome = one_token(clipped_surrogate, ratio, advantage, **CLIP)
    assert outcome.loss == pytest.approx(loss)
    assert outcome.gradient == pytest.approx(loss if learns else 0.0)
    assert outcome.indicators == {"clip_fraction": 0.0 if learns else 1.0}


@quick
@given(ratio=ratios, advantage=advantages_)
def test_clipped_surrogate_by_definition(ratio: float, advantage: float) -> None:
    """Checklist 43. The objective of eq. 7, min(rho A, clip(rho) A), with its sign turned."""
    objective = min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
    assert one_token(clipped_surrogate, ratio, advantage, **CLIP).loss == pytest.approx(-objective)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.3), (0.3, 0.2)])
def test_the_two_bounds_are_told_apart(low: float, high: float) -> None:
    """Checklist 43. A ratio of 1.25 passes an upper bound of 0.3, not of 0.2; 0.75 a lower one of 0.3, not of 0.2."""
    up = one_token(clipped_surrogate, 1.25, 1.0, clip_low=low, clip_high=high)
    down = one_token(clipped_surrogate, 0.75, -1.0, clip_low=low, clip_high=high)
    assert up.loss == pytest.approx(-min(1.25, 1 + high))
    assert down.loss == pytest.approx(max(0.75, 1 - low))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "bounded"),
    [
        pytest.param(-2.0, 4.0, 6.0, 0.0, 1.0, id="bad-action-far-above"),
        pytest.param(-2.0, 2.5, 5.0, 5.0, 0.0, id="bad-action-above-but-within"),
        pytest.param(2.0, 4.0, -2.0 * (1 + HIGH), 0.0, 0.0, id="good-action-far-above"),
        pytest.param(-2.0, 0.1, 2.0 * (1 - LOW), 0.0, 0.0, id="bad-action-below"),
        pytest.param(2.0, 0.1, -0.2, -0.2, 0.0, id="good-action-below"),
    ],
)
def test_dual_clip_by_sign(advantage: float, ratio: float, loss: float, gradient: float, bounded: float) -> None:
    """Checklist 44. Only a bad action that has become far more probable is bounded, at c |A|, and stops pushing."""
    outcome = one_token(dual_clipped_surrogate, ratio, advantage, **DUAL_CLIP)
    assert outcome.loss == pytest.approx(loss)
    assert outcome.gradient == pytest.approx(gradient)
    assert outcome.indicators["dual_clip_fraction"] == bounded


@quick
@given(ratio=ratios, advantage=advantages_)
def test_dual_clip_reduces_to_the_clipped_surrogate(ratio: float, advantage: float) -> None:
    """Checklist 44. The same unless A < 0, where it is max(clipped objective, c A), eq. 5."""
    plain = one_token(clipped_surrogate, ratio, advantage, **CLIP)
    dual = one_token(dual_clipped_surrogate, ratio, advantage, **DUAL_CLIP)
    objective = max(-plain.loss, DUAL * advantage) if advantage < 0 else -plain.loss
    assert dual.loss == pytest.approx(-objective)
    assert dual.indicators["clip_fraction"] == plain.indicators["clip_fraction"]
    if ratio < DUAL:
        assert (dual.loss, dual.gradient) == (plain.loss, plain.gradient)


@pytest.mark.parametrize("loss", [ClippedSurrogate(**CLIP), DualClippedSurrogate(**DUAL_CLIP)], ids=["clip", "dual"])
def test_at_the_old_policy_it_is_the_policy_gradient(loss: ClippedSurrogate) -> None:
    """Checklist 43. Ratio 1, nothing clipped, gradient -A grad log pi through the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    advantages = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, 6, (3, 4), generator=generator)
    mask = torch.arange(4) < torch.tensor([[4], [2], [0]])
    logprobs = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    losses, indicators = loss(logprobs, logprobs.detach(), advantages, mask)
    (gradient,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    (reinforce,) = torch.autograd.grad(-(advantages * mask * logprobs).sum(), logits)
    assert_close(gradient, reinforce)
    assert_close(losses.detach(), -advantages * mask)
    assert all(x.eq(0).all() for x in indicators.values())


def test_descent_makes_a_good_action_more_probable() -> None:
    """The sign of the loss: one step of gradient descent on it, both ways."""
    for advantage in (1.0, -1.0):
        logits = torch.zeros(1, 1, 3, requires_grad=True)
        logprobs = logits.log_softmax(-1)[..., 0]
        losses, _ = clipped_surrogate(
            logprobs, logprobs.detach(), torch.tensor([[advantage]]), torch.tensor([[True]]), **CLIP
        )
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        probability = (logits - gradient).softmax(-1)[0, 0, 0]
        assert (probability > 1 / 3) == (advantage > 0)


def test_gradient_against_finite_differences() -> None:
    """Checklist 43. Away from the kinks, for all four signs and sides at once."""
    logprobs = torch.tensor([[-1.0, -2.0, -0.5, -3.0, -1.2]], dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - torch.tensor([[0.5, 0.5, -0.5, -0.5, 0.1]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True, False]])
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, old, advantages, mask, **CLIP)[0], logprobs)


@pytest.mark.parametrize("log_ratio", [-19.9, -5.0, 0.0, 5.0, 19.9])
def test_the_clamp_leaves_the_normal_range_alone(log_ratio: float) -> None:
    """Checklist 46. The ratio is exp(log-ratio), and so is its derivative."""
    logprobs = torch.tensor([[log_ratio - 1]], dtype=torch.float64, requires_grad=True)
    ratio = probability_ratio(logprobs, torch.full((1, 1), -1.0, dtype=torch.float64), torch.tensor([[True]]))
    (gradient,) = torch.autograd.grad(ratio.sum(), logprobs)
    expected = torch.tensor([[math.exp(log_ratio)]], dtype=torch.float64)
    assert_close(ratio.detach(), expected)
    assert_close(gradient, expected)


@pytest.mark.parametrize("log_ratio", [-1000.0, -20.5, 20.5, 1000.0])
def test_the_clamp_keeps_a_runaway_ratio_finite(log_ratio: float) -> None:
    """Checklist 46. exp(1000) is infinite; beyond +-20 the ratio stays where it was at +-20."""
    ratio = probability_ratio(torch.tensor([[log_ratio]]), torch.zeros(1, 1), torch.tensor([[True]]))
    assert MAX_LOG_RATIO == 20
    assert_close(ratio.log(), torch.tensor([[math.copysign(20.0, log_ratio)]]))


def test_ratio_is_one_outside_the_mask() -> None:
    """Checklist 11 and Checklist 13."""
    logprobs = torch.tensor([[-1.0, -9.0, math.nan]])
    ratio = probability_ratio(logprobs, torch.tensor([[-2.0, -1.0, -math.inf]]), torch.tensor([[True, False, False]]))
    assert_close(ratio, torch.tensor([[math.e, 1.0, 1.0]]))


@pytest.mark.parametrize(
    ("loss", "function", "settings"),
    [
        (ClippedSurrogate, clipped_surrogate, CLIP),
        (DualClippedSurrogate, dual_clipped_surrogate, DUAL_CLIP),
    ],
    ids=["clip", "dual"],
)
def test_objects_apply_their_functions(loss: Any, function: Any, settings: dict[str, float]) -> None:
    """The frozen object is the pure function with its settings held, every setting different from the others."""
    logprobs, old, advantages = torch.randn(3, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.arange(8).unsqueeze(1)
    actual, expected = (
        loss(**settings)(logprobs, old, advantages, mask),
        function(logprobs, old, advantages, mask, **settings),
    )
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])
    assert all(x.sum() > 0 for x in actual[1].values())  # the case exercises every indicator


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("clip_low", 0.0, ("0", "1")),
        ("clip_low", 1.0, ("0", "1")),
        ("clip_low", -0.2, ("0", "1")),
        ("clip_low", math.nan, ("0", "1")),
        ("clip_high", 0.0, ("0",)),
        ("clip_high", -0.1, ("0",)),
        ("dual_clip", 1 + HIGH, ("1 + clip_high",)),
        ("dual_clip", 0.5, ("1 + clip_high",)),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float, limits: tuple[str, ...]) -> None:
    """Named by field, value and range; the second loss refuses what the first does."""
    losses = [DualClippedSurrogate] if name == "dual_clip" else [ClippedSurrogate, DualClippedSurrogate]
    for loss in losses:
        settings = (CLIP if loss is ClippedSurrogate else DUAL_CLIP) | {name: value}
        with pytest.raises(SettingError) as error:
            loss(**settings)
        assert error.value.name == name
        for part in (name, repr(value), *limits):
            assert part in str(error.value)


def test_wide_settings_are_allowed() -> None:
    """An upper bound above 1 is a ratio above 2, which is a policy one may want; the lower one must stay below 1."""
    assert ClippedSurrogate(clip_low=0.99, clip_high=4.0).clip_high == 4.0
    assert DualClippedSurrogate(clip_low=0.2, clip_high=4.0, dual_clip=5.1).dual_clip == 5.1


def test_losses_of_unequal_tokens_stay_apart() -> None:
    """Checklist 11. A batch of all the sign cases gives each token what it gets alone, and masked ones nothing."""
    cases: list[Any] = [case.values for case in SIGN_CASES]
    advantages = torch.tensor([[case[0] for case in cases]], dtype=torch.float64)
    logprobs = torch.tensor([[math.log(case[1]) for case in cases]], dtype=torch.float64)
    expected = torch.tensor([[case[2] for case in cases]], dtype=torch.float64)
    mask: Tensor = torch.arange(len(cases)).unsqueeze(0) % 3 != 1
    losses, _ = clipped_surrogate(logprobs, torch.zeros_like(logprobs), advantages, mask, **CLIP)
    assert_close(losses, expected * mask)
