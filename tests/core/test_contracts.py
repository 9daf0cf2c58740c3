"""What every function of `src.core` and of `BESIDE` owes its callers: masks are respected, inputs are left alone."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close

import src.core
from src.core import estimators
from src.kernels import attention, linear
from src.models import vocab_head
from tests.core.tables import (
    CONSTANT_OUTSIDE,
    MASKED,
    NEVER_DIFFERENTIATED_WITHOUT_VARIANCE,
    OTHERS,
    UNBOUNDED,
    Call,
    Inputs,
    make_inputs,
    tensors,
)

BESIDE = (attention, linear, vocab_head)  # pure functions of tensors, in other rooms
ALL = MASKED | OTHERS
DIFFERENTIABLE = [name for name in MASKED if name not in NEVER_DIFFERENTIATED_WITHOUT_VARIANCE]
quick = settings(deadline=None, derandomize=True, max_examples=15)
masks = st.tuples(st.integers(1, 3), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=1, max_size=shape[0])
)


def hold(contract: Callable[[str], None], names: Iterable[str] = MASKED) -> None:
    """The contract for every function; all that break it are named at once, each with what went wrong."""
    broken = {}
    for name in names:
        try:
            contract(name)
        except (Exception, pytest.fail.Exception) as error:  # whatever a function does wrong
            broken[name] = f"{type(error).__name__}: {error}"
    if broken:
        pytest.fail("\n".join(f"{name}: {why}" for name, why in broken.items()))


def test_a_broken_contract_names_every_function_that_breaks_it() -> None:
    def positive(name: str) -> None:
        assert {"a": 1, "b": -1, "c": 0, "d": math.log}[name] > 0

    with pytest.raises(pytest.fail.Exception) as error:
        hold(positive, ["a", "b", "c", "d"])
    assert re.findall(r"^(\w): (\w+)", str(error.value), re.M) == [
        ("b", "AssertionError"),
        ("c", "AssertionError"),
        ("d", "TypeError"),
    ]


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
        group_ids=change(inputs.group_ids),
    )


JUNK: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: 50 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9)),
    "nan": lambda x: torch.full_like(x, math.nan),
    "inf": lambda x: torch.full_like(x, math.inf),
    "-inf": lambda x: torch.full_like(x, -math.inf),
    "huge": lambda x: torch.full_like(x, 1e300),
}


@pytest.mark.parametrize("junk", JUNK)
@quick
@given(rows=masks)
def test_what_lies_outside_the_mask_changes_no_value(junk: str, rows: list[list[bool]]) -> None:
    """Checklist 11 and Checklist 13."""
    inputs = make_inputs(torch.tensor(rows))
    spoiled = with_junk(inputs, JUNK[junk])

    def contract(name: str) -> None:
        results = [r.detach() for r in tensors(MASKED[name](spoiled))]
        assert_close(results, [r.detach() for r in tensors(MASKED[name](inputs))])

    hold(contract)


@pytest.mark.parametrize("junk", ["nan", "inf", "random"])
def test_what_lies_outside_the_mask_changes_no_gradient(junk: str) -> None:
    """Checklist 11 and Checklist 13. Nor does anything outside the mask receive one."""
    inputs = make_inputs(torch.tensor([[True, True, True, False], [True, False, True, False], [False] * 4]))

    def contract(name: str) -> None:
        _, gradients = values_and_gradients(MASKED[name], with_junk(inputs, JUNK[junk]))
        assert_close(gradients, values_and_gradients(MASKED[name], inputs)[1])
        for gradient in gradients[:3]:
            assert_close(gradient[~inputs.mask], torch.zeros_like(gradient[~inputs.mask]))
        assert any(gradient.ne(0).any() for gradient in gradients)  # the comparison is about something

    hold(contract)


@pytest.mark.parametrize("junk", ["nan", "-inf"])
@settings(quick, max_examples=8)
@given(rows=masks)
def test_nor_does_it_change_a_gradient_for_any_mask(junk: str, rows: list[list[bool]]) -> None:
    """Checklist 11 and Checklist 13. Rows of any length, with gaps or empty, and single tokens."""
    inputs = make_inputs(torch.tensor(rows))

    def contract(name: str) -> None:
        _, gradients = values_and_gradients(MASKED[name], with_junk(inputs, JUNK[junk]))
        assert_close(gradients, values_and_gradients(MASKED[name], inputs)[1])

    hold(contract, DIFFERENTIABLE)


def test_per_token_results_are_constant_outside_the_mask() -> None:
    """Checklist 11."""
    inputs = make_inputs(torch.tensor([[True, True, False], [False, True, False]]))

    def contract(name: str) -> None:
        outside = [r.detach()[~inputs.mask] for r in tensors(MASKED[name](inputs)) if r.dim() == 2]
        assert_close(outside, [torch.full_like(r, CONSTANT_OUTSIDE.get(name, 0.0)) for r in outside])

    hold(contract)


@pytest.mark.parametrize("counted", [0, 1])
def test_no_or_one_counted_token_is_finite(counted: int) -> None:
    """Checklist 12 and Checklist 41. Values and gradients; with none the result is 0."""
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, :counted] = True
    inputs = make_inputs(mask)

    def contract(name: str) -> None:
        results, gradients = values_and_gradients(MASKED[name], inputs)
        assert all(r.isfinite().all() for r in results)
        if counted == 0:
            assert_close(results, [torch.full_like(r, CONSTANT_OUTSIDE.get(name, 0.0)) for r in results])
        if name in DIFFERENTIABLE:
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert counted or all(gradient.eq(0).all() for gradient in gradients)

    hold(contract)


def test_an_empty_row_contributes_nothing() -> None:
    """Checklist 12. The other rows and every total are as they are without it."""
    inputs = make_inputs(torch.tensor([[True, True, False], [True, True, True], [False, False, False]]))
    fewer = changed(inputs, lambda x: x[:2])

    def contract(name: str) -> None:
        with_row, without = tensors(MASKED[name](inputs)), tensors(MASKED[name](fewer))
        assert_close([r[:2] if r.dim() else r for r in with_row], without)

    hold(contract)


def test_more_right_padding_changes_nothing() -> None:
    """Checklist 36 and Checklist 11. Nothing per token, nothing in a total."""
    inputs = make_inputs(torch.tensor([[True, True, False], [True, False, True], [True, True, True]]))

    def longer(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 2), value=0 if x.dtype == torch.bool else 66.0)

    padded = replace(changed(inputs, longer), scores=inputs.scores, group_ids=inputs.group_ids)

    def contract(name: str) -> None:
        trimmed = [r[:, :3] if r.dim() else r for r in tensors(MASKED[name](padded))]
        assert_close(trimmed, tensors(MASKED[name](inputs)))

    hold(contract)


def test_the_order_of_the_rows_does_not_matter() -> None:
    """Per-token results move with their rows; totals stay."""
    inputs = make_inputs(torch.tensor([[True, True, False], [True, False, True], [True, True, True]]))
    order = torch.tensor([2, 0, 1])
    shuffled = changed(inputs, lambda x: x[order])

    def contract(name: str) -> None:
        expected = [r[order] if r.dim() else r for r in tensors(MASKED[name](inputs))]
        assert_close(tensors(MASKED[name](shuffled)), expected)

    hold(contract)


@pytest.mark.parametrize("wrong", ["one number per row", "one number per sequence and token swapped", "one row more"])
def test_numbers_of_another_shape_are_refused(wrong: str) -> None:
    """B = T, so that torch itself would broadcast what has the wrong shape without a word."""
    inputs = make_inputs(torch.ones(3, 3, dtype=torch.bool))
    shaped: dict[str, Callable[[Tensor], Tensor]] = {
        "one number per row": lambda x: x[0] if x.dim() == 2 else x,
        "one number per sequence and token swapped": lambda x: x.unsqueeze(0) if x.dim() == 1 else x[:, :1],
        "one row more": lambda x: torch.cat([x, x[:1]]),
    }
    numbers = {field: shaped[wrong](getattr(inputs, field)) for field in ("x", "y", "z", "scores")}

    def contract(name: str) -> None:
        if (name, wrong) == ("per_token", "one number per row"):  # which is what it takes
            return
        with pytest.raises(TypeCheckError):
            MASKED[name](replace(inputs, **numbers))

    hold(contract)


def test_a_mask_of_numbers_is_refused() -> None:
    inputs = make_inputs(torch.ones(3, 3, dtype=torch.bool))

    def contract(name: str) -> None:
        with pytest.raises(TypeCheckError):
            MASKED[name](replace(inputs, mask=inputs.mask.double()))

    hold(contract)


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "huge": lambda x: 1e4 * x.sign(),
    "huge and equal": lambda x: torch.full_like(x, 1e4),
    "equal": lambda x: torch.full_like(x, 0.1),
    "zero": torch.zeros_like,
}


def extreme(which: str, dtype: torch.dtype) -> Inputs:
    """Every number of the inputs at an extreme."""
    inputs = make_inputs(torch.tensor([[True, True, False], [True, False, True], [True, True, True]]))
    numbers = {name: getattr(inputs, name).detach() for name in ("x", "y", "z", "scores", "logits")}
    return replace(inputs, **{name: EXTREMES[which](x).to(dtype).requires_grad_() for name, x in numbers.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", EXTREMES)
def test_extreme_numbers_stay_finite(which: str, dtype: torch.dtype) -> None:
    """Checklist 41. Values of all; gradients of what may be learned through."""
    inputs = extreme(which, dtype)

    def contract(name: str) -> None:
        assert all(r.isfinite().all() for r in tensors(ALL[name](inputs)))
        if name in DIFFERENTIABLE:
            assert all(gradient.isfinite().all() for gradient in values_and_gradients(ALL[name], inputs)[1])

    hold(contract, [name for name in ALL if name not in UNBOUNDED])


def test_inputs_are_left_alone() -> None:
    """Compared with a copy, and by the counter of in-place writes, which also sees a write of equal numbers."""

    def contract(name: str) -> None:
        inputs = make_inputs(torch.tensor([[True, True, False], [True, False, True], [True, True, True]]))
        before = {field: v.detach().clone() for field, v in vars(inputs).items() if isinstance(v, Tensor)}
        writes = {field: getattr(inputs, field)._version for field in before}
        rows = [list(row) for row in inputs.token_rows]
        ALL[name](replace(inputs, x=inputs.x.detach(), y=inputs.y.detach(), z=inputs.z.detach()))
        assert_close({field: getattr(inputs, field).detach() for field in before}, before)
        assert {field: getattr(inputs, field)._version for field in before} == writes
        assert inputs.token_rows == rows

    hold(contract, ALL)


def public_names() -> Iterator[str]:
    """Every public function and concrete class that a module of `src.core`, or one beside it, defines."""
    core = [importlib.import_module(f"src.core.{info.name}") for info in pkgutil.iter_modules(src.core.__path__)]
    for module in (*core, *BESIDE):
        for name, value in vars(module).items():
            defined_here = getattr(value, "__module__", None) == module.__name__
            concrete = inspect.isfunction(value) or (inspect.isclass(value) and not inspect.isabstract(value))
            if defined_here and not name.startswith("_") and concrete:
                yield name


def test_every_function_is_held_to_these_contracts() -> None:
    """A new function gets its line in one of the tables; an abstract class is held by what it begets."""
    without_tensors = {estimators.require_unit.__name__, vocab_head.computing_dtype.__name__}
    held, defined = {name.split(",")[0] for name in ALL} | without_tensors, set(public_names())
    missing, gone = ", ".join(sorted(defined - held)), ", ".join(sorted(held - defined))
    assert not missing, f"add {missing} to tests/core/tables.py"
    assert not gone, f"remove {gone} from tests/core/tables.py"
