"""What every function of `src.core` owes its callers: masks are respected and inputs are left alone."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import src.core
from src.core import (
    advantages,
    aggregation,
    checks,
    diagnostics,
    kl,
    logprobs,
    masking,
    padding,
    policy_losses,
    preference,
    rewards,
    value_losses,
)

VOCABULARY = 5


@dataclass
class Inputs:
    """Something of every kind that a core function takes; `x`, `y` and `z` are per token."""

    mask: Tensor  # (B, T) bool
    x: Tensor  # (B, T)
    y: Tensor  # (B, T)
    z: Tensor  # (B, T)
    scores: Tensor  # (B,)
    finished: Tensor  # (B,) bool
    logits: Tensor  # (B, T, V)
    ids: Tensor  # (B, T) int64
    stop_ids: Tensor  # (K,) int64
    token_rows: list[list[int]]


Call = Callable[[Inputs], Any]


def advantage_function(i: Inputs) -> Any:
    return advantages.GAE(0.9, 0.8, 0.7)(i.x, i.mask, i.y)


def dual_clip(i: Inputs) -> Any:
    return policy_losses.dual_clipped_surrogate(i.x, i.y, i.z, i.mask, 0.2, 0.3, 2.0)


MASKED: dict[str, Call] = {
    "gae": lambda i: advantages.gae(i.x, i.y, i.mask, 0.9, 0.8),
    "lambda_returns": lambda i: advantages.lambda_returns(i.x, i.y, i.mask, 0.9, 0.8),
    "GAE": advantage_function,
    "weighted_sum": lambda i: aggregation.weighted_sum(i.x, aggregation.token_mean(i.mask), i.mask),
    "explained_variance": lambda i: diagnostics.explained_variance(i.x, i.y, i.mask),
    "masked": lambda i: masking.masked(i.x, i.mask),
    "masked_mean": lambda i: masking.masked_mean(i.x, i.mask),
    "masked_variance": lambda i: masking.masked_variance(i.x, i.mask),
    "whiten": lambda i: masking.whiten(i.x, i.mask),
    "whiten, mean kept": lambda i: masking.whiten(i.x, i.mask, shift_mean=False),
    "probability_ratio": lambda i: policy_losses.probability_ratio(i.x, i.y, i.mask),
    "clipped_surrogate": lambda i: policy_losses.clipped_surrogate(i.x, i.y, i.z, i.mask, 0.2, 0.3),
    "dual_clipped_surrogate": dual_clip,
    "ClippedSurrogate": lambda i: policy_losses.ClippedSurrogate(0.2, 0.3)(i.x, i.y, i.z, i.mask),
    "DualClippedSurrogate": lambda i: policy_losses.DualClippedSurrogate(0.2, 0.3, 2.0)(i.x, i.y, i.z, i.mask),
    "token_rewards": lambda i: rewards.token_rewards(i.scores, i.x, i.mask, 0.1),
    "squared_error": lambda i: value_losses.squared_error(i.x, i.y, i.mask),
    "clipped_squared_error": lambda i: value_losses.clipped_squared_error(i.x, i.y, i.z, i.mask, 0.2),
    "SquaredError": lambda i: value_losses.SquaredError()(i.x, i.y, i.z, i.mask),
    "ClippedSquaredError": lambda i: value_losses.ClippedSquaredError(0.2)(i.x, i.y, i.z, i.mask),
}
OTHERS: dict[str, Call] = {
    "token_mean": lambda i: aggregation.token_mean(i.mask),
    "k1": lambda i: kl.k1(i.x, i.y),
    "k2": lambda i: kl.k2(i.x, i.y),
    "k3": lambda i: kl.k3(i.x, i.y),
    "logprobs_from_logits": lambda i: logprobs.logprobs_from_logits(i.logits, i.ids, 0.7),
    "entropy_from_logits": lambda i: logprobs.entropy_from_logits(i.logits, 0.7),
    "position_ids": lambda i: masking.position_ids(i.mask),
    "until_first_stop": lambda i: masking.until_first_stop(i.ids, i.stop_ids),
    "last_counted": lambda i: masking.last_counted(i.mask),
    "pad_left": lambda i: padding.pad_left(i.token_rows, 0),
    "pairwise_loss": lambda i: preference.pairwise_loss(i.x, i.y),
    "pairwise_accuracy": lambda i: preference.pairwise_accuracy(i.x, i.y),
    "set_missing_eos": lambda i: rewards.set_missing_eos(i.scores, i.finished, -1.0),
    "subtract_missing_eos": lambda i: rewards.subtract_missing_eos(i.scores, i.finished, 1.0),
}
CONSTANT_OUTSIDE = {"probability_ratio": 1.0}  # all others are 0 there
# a number for the log; at a variance of 0, where it is set to 0, its gradient means nothing
NEVER_DIFFERENTIATED_WITHOUT_VARIANCE = {"explained_variance"}

masked_functions = pytest.mark.parametrize("name", MASKED)
quick = settings(deadline=None, derandomize=True, max_examples=15)
masks = st.tuples(st.integers(1, 3), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=1, max_size=shape[0])
)


def make_inputs(mask: Tensor) -> Inputs:
    """Seeded inputs of the shape of a mask."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    ids = torch.randint(0, VOCABULARY, mask.shape, generator=generator)
    return Inputs(
        mask=mask,
        x=normal(*mask.shape),
        y=normal(*mask.shape),
        z=normal(*mask.shape),
        scores=normal(len(mask)),
        finished=torch.arange(len(mask)) % 2 == 0,
        logits=normal(*mask.shape, VOCABULARY),
        ids=ids,
        stop_ids=torch.tensor([1, 3]),
        token_rows=ids.tolist(),
    )


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a result, whatever it is packed in."""
    if isinstance(value, Tensor):
        return [value]
    return [x for part in (value.values() if isinstance(value, dict) else value) for x in tensors(part)]


def values_and_gradients(call: Call, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of a weighted total of them with respect to x, y, z and the scores."""
    results = tensors(call(inputs))
    weights = torch.linspace(1.0, 2.0, 7, dtype=torch.float64)
    differentiable = [r for r in results if r.requires_grad]
    total = torch.stack([(r * weights[: r.shape[-1]] if r.dim() else r).sum() for r in differentiable]).sum()
    leaves = (inputs.x, inputs.y, inputs.z, inputs.scores)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [r.detach() for r in results], list(gradients)


def with_junk(inputs: Inputs, junk: Callable[[Tensor], Tensor]) -> Inputs:
    """The same inputs with something else outside the mask."""

    def spoil(x: Tensor) -> Tensor:
        return torch.where(inputs.mask, x.detach(), junk(x.detach())).requires_grad_()

    return replace(inputs, x=spoil(inputs.x), y=spoil(inputs.y), z=spoil(inputs.z))


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same change to the mask and to everything that goes with it."""
    return replace(
        inputs,
        mask=change(inputs.mask),
        x=change(inputs.x),
        y=change(inputs.y),
        z=change(inputs.z),
        scores=change(inputs.scores),
    )


JUNK: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: 50 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9)),
    "nan": lambda x: torch.full_like(x, math.nan),
    "inf": lambda x: torch.full_like(x, math.inf),
    "-inf": lambda x: torch.full_like(x, -math.inf),
    "huge": lambda x: torch.full_like(x, 1e300),
}


@masked_functions
@pytest.mark.parametrize("junk", JUNK)
@quick
@given(rows=masks)
def test_what_lies_outside_the_mask_changes_no_value(name: str, junk: str, rows: list[list[bool]]) -> None:
    """Checklist 11 and Checklist 13."""
    inputs = make_inputs(torch.tensor(rows))
    results = [r.detach() for r in tensors(MASKED[name](with_junk(inputs, JUNK[junk])))]
    assert_close(results, [r.detach() for r in tensors(MASKED[name](inputs))])


gradient_cases = [(name, junk) for name in MASKED for junk in ("nan", "inf", "random")]


@pytest.mark.parametrize(("name", "junk"), gradient_cases)
def test_what_lies_outside_the_mask_changes_no_gradient(name: str, junk: str) -> None:
    """Checklist 11 and Checklist 13. Nor does anything outside the mask receive one."""
    inputs = make_inputs(torch.tensor([[True, True, True, False], [True, False, True, False], [False] * 4]))
    _, gradients = values_and_gradients(MASKED[name], with_junk(inputs, JUNK[junk]))
    assert_close(gradients, values_and_gradients(MASKED[name], inputs)[1])
    for gradient in gradients[:3]:
        assert_close(gradient[~inputs.mask], torch.zeros_like(gradient[~inputs.mask]))
    assert any(gradient.ne(0).any() for gradient in gradients)  # the comparison is about something


@masked_functions
def test_per_token_results_are_constant_outside_the_mask(name: str) -> None:
    """Checklist 11."""
    inputs = make_inputs(torch.tensor([[True, True, False], [False, True, False]]))
    outside = [r.detach()[~inputs.mask] for r in tensors(MASKED[name](inputs)) if r.dim() == 2]
    assert_close(outside, [torch.full_like(r, CONSTANT_OUTSIDE.get(name, 0.0)) for r in outside])


@masked_functions
@pytest.mark.parametrize("counted", [0, 1])
def test_no_or_one_counted_token_is_finite(name: str, counted: int) -> None:
    """Checklist 12 and Checklist 41. Values and gradients; with none the result is 0."""
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, :counted] = True
    inputs = make_inputs(mask)
    results, gradients = values_and_gradients(MASKED[name], inputs)
    assert all(r.isfinite().all() for r in results)
    if counted == 0:
        assert_close(results, [torch.full_like(r, CONSTANT_OUTSIDE.get(name, 0.0)) for r in results])
    if name not in NEVER_DIFFERENTIATED_WITHOUT_VARIANCE:
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert counted or all(gradient.eq(0).all() for gradient in gradients)


@masked_functions
def test_an_empty_row_contributes_nothing(name: str) -> None:
    """Checklist 12. The other rows and every total are as they are without it."""
    inputs = make_inputs(torch.tensor([[True, True, False], [True, True, True], [False, False, False]]))
    fewer = changed(inputs, lambda x: x[:2])
    with_row, without = tensors(MASKED[name](inputs)), tensors(MASKED[name](fewer))
    assert_close([r[:2] if r.dim() else r for r in with_row], without)


@masked_functions
def test_more_right_padding_changes_nothing(name: str) -> None:
    """Checklist 36 and Checklist 11. Nothing per token, nothing in a total."""
    inputs = make_inputs(torch.tensor([[True, True, False], [True, False, True], [True, True, True]]))

    def longer(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 2), value=0 if x.dtype == torch.bool else 66.0)

    padded = replace(changed(inputs, longer), scores=inputs.scores)
    trimmed = [r[:, :3] if r.dim() else r for r in tensors(MASKED[name](padded))]
    assert_close(trimmed, tensors(MASKED[name](inputs)))


@masked_functions
def test_the_order_of_the_rows_does_not_matter(name: str) -> None:
    """Per-token results move with their rows; totals stay."""
    inputs = make_inputs(torch.tensor([[True, True, False], [True, False, True], [True, True, True]]))
    order = torch.tensor([2, 0, 1])
    shuffled = changed(inputs, lambda x: x[order])
    expected = [r[order] if r.dim() else r for r in tensors(MASKED[name](inputs))]
    assert_close(tensors(MASKED[name](shuffled)), expected)


@pytest.mark.parametrize("name", MASKED | OTHERS)
def test_inputs_are_left_alone(name: str) -> None:
    """Compared with a copy, and by the counter of in-place writes, which also sees a write of equal numbers."""
    inputs = make_inputs(torch.tensor([[True, True, False], [True, False, True], [True, True, True]]))
    before = {field: v.detach().clone() for field, v in vars(inputs).items() if isinstance(v, Tensor)}
    writes = {field: getattr(inputs, field)._version for field in before}
    rows = [list(row) for row in inputs.token_rows]
    (MASKED | OTHERS)[name](replace(inputs, x=inputs.x.detach(), y=inputs.y.detach(), z=inputs.z.detach()))
    assert_close({field: getattr(inputs, field).detach() for field in before}, before)
    assert {field: getattr(inputs, field)._version for field in before} == writes
    assert inputs.token_rows == rows


def public_names() -> Iterator[str]:
    """Every public function and class that a module of `src.core` defines."""
    for info in pkgutil.iter_modules(src.core.__path__):
        module = importlib.import_module(f"src.core.{info.name}")
        for name, value in vars(module).items():
            defined_here = getattr(value, "__module__", None) == module.__name__
            if defined_here and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
                yield name


def test_every_function_is_held_to_these_contracts() -> None:
    """A new function of `src.core` gets its line in one of the tables above."""
    without_tensors = {checks.require.__name__, checks.SettingError.__name__}
    assert {name.split(",")[0] for name in MASKED | OTHERS} | without_tensors == set(public_names())
