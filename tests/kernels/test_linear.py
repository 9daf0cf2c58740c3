"""The faster product against the plain one: numbers, gradients and second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from src.kernels import linear as kernel
from src.kernels.linear import bfloat16_is_native, by_onednn, few_sizes, linear, low_rank, onednn_is_faster, prepacked

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True, params=[True, False], ids=["onednn", "mkl"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN is the faster library, whatever processor this is."""
    monkeypatch.setattr(kernel, "onednn_is_faster", lambda: request.param)
    return bool(request.param)


@pytest.fixture(params=[True, False], ids=["with units", "without units"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor multiplies in bfloat16; one without cannot act as one with."""
    if request.param and not bfloat16_is_native():
        pytest.skip("this processor does not multiply in bfloat16")
    monkeypatch.setattr(kernel, "bfloat16_is_native", lambda: request.param)
    return bool(request.param)


def inputs(shape: tuple[int, ...], bias: bool, transposed: bool) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(5, shape[-1], generator=draws)
    if transposed:  # the same numbers in the other order of memory
        weight = weight.t().contiguous().t()
    tensors = [torch.randn(shape, generator=draws), weight, *([torch.randn(5, generator=draws)] if bias else [])]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7), (1, 1, 7)])
def test_it_is_the_plain_product_with_its_gradients(shape: tuple[int, ...], bias: bool, transposed: bool) -> None:
    given = inputs(shape, bias, transposed)
    found, expected = linear(*given), F.linear(*given)
    assert_close(found, expected, **CLOSE)
    above = torch.linspace(-1, 1, found.numel()).view_as(found)
    assert_close(torch.autograd.grad(found, given, above), torch.autograd.grad(expected, given, above), **CLOSE)
    with torch.no_grad():
        assert_close(linear(*given), expected, **CLOSE)


def test_results_may_be_changed_in_place() -> None:
    """As Falcon's parallel attention does; a view that a Function returns may not be."""
    x, weight = inputs((2, 3, 7), False, False)
    a, b = (torch.ones(shape, requires_grad=True) for shape in ((2, 7), (5, 2)))
    for found in (linear(x, weight), low_rank(linear(x, weight), x, a, b, 0.5)):
        found += x.sum(-1, keepdim=True)
        found.sum().backward()
    plain = F.linear(x, weight)
    expected = 2 * (plain + x.sum(-1, keepdim=True)) + F.linear(F.linear(x, a) * 0.5, b)
    given = [x.grad, weight.grad, a.grad, b.grad]
    assert_close(given, list(torch.autograd.grad(expected.sum(), (x, weight, a, b))), **CLOSE)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    x, weight = inputs((3, 7), False, False)
    linear(x, weight.detach()).sum().backward()
    assert_close(x.grad, weight.detach().sum(0).expand(3, 7), **CLOSE)
    linear(x.detach(), weight).sum().backward()
    assert_close(weight.grad, x.detach().sum(0).expand(5, 7), **CLOSE)


def test_it_can_be_differentiated_twice() -> None:
    """As the Fisher-vector products of TRPO need."""
    given = inputs((3, 7), True, False)

    def second(product: object) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(product(*given).tanh().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    assert_close(second(linear), second(F.linear), **CLOSE)


def test_float64_is_left_as_it_is() -> None:
    given = [tensor.detach().double() for tensor in inputs((3, 7), True, False)]
    assert torch.equal(linear(*given), F.linear(*given))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7), (1, 1, 7)])
def test_bfloat16_is_multiplied_exactly_and_rounded_once(
    shape: tuple[int, ...], bias: bool, transposed: bool, native: bool
) -> None:
    """Without units for it: 8 places, so a rounding is 2^-8 at most; sums in float32 are exact to 1e-5 here.

    With units it is PyTorch's own product, which may round a sum before it adds the bias.
    """
    given = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs(shape, bias, transposed)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found, expected = linear(*given), F.linear(*exact)
    assert found.dtype == torch.bfloat16
    rounded = {"atol": 0.05, "rtol": 0.02} if native else {"atol": 1e-5, "rtol": 2**-8}
    assert_close(found.double(), expected, **rounded)
    above = torch.linspace(-1, 1, found.numel()).view_as(found).bfloat16()
    gradients = torch.autograd.grad(found, given, above)
    wanted = torch.autograd.grad(expected, exact, above.double())
    assert_close([g.double() for g in gradients[:2]], list(wanted[:2]), **rounded)
    with torch.no_grad():
        assert torch.equal(linear(*given), F.linear(*given) if native else found)


def test_without_units_for_bfloat16_float32_multiplies(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the result is what it gives, rounded: PyTorch's own product in bfloat16 takes 10 to 100 times as long."""
    monkeypatch.setattr(kernel, "bfloat16_is_native", lambda: False)
    given = [tensor.detach().bfloat16() for tensor in inputs((3, 7), True, False)]
    seen: list[torch.dtype] = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: (seen.append(x.dtype), plain(x, *rest))[1])
    found = linear(*given)
    assert set(seen) == (set() if onednn else {torch.float32})
    wide = [tensor.float() for tensor in given]
    assert torch.equal(found, linear(*wide).bfloat16())
    assert prepacked(given[1]) is None


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_is_heard(weights: torch.dtype, native: bool) -> None:
    x, weight, bias = inputs((3, 7), True, False)
    given = x, *(tensor.detach().to(weights).requires_grad_() for tensor in (weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(*given)
        found.sum().backward()
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), F.linear(x, weight, bias), atol=0.05, rtol=0.02)
    assert x.grad is not None
    assert_close(x.grad, weight.detach().sum(0).expand(3, 7), atol=0.05, rtol=0.02)


def test_rows_without_elements_pass() -> None:
    assert linear(torch.zeros(0, 7), torch.zeros(5, 7)).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (2, 300, 7), (1, 1, 7)])
def test_a_prepacked_weight_gives_the_plain_product_with_its_gradient(
    shape: tuple[int, ...], bias: bool, transposed: bool, dtype: torch.dtype, onednn: bool
) -> None:
    x, weight, *rest = [tensor.detach().to(dtype) for tensor in inputs(shape, bias, transposed)]
    packed = prepacked(weight)
    assert (packed is not None) == (onednn if dtype == torch.float32 else bfloat16_is_native())
    x.requires_grad_()
    close = CLOSE if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    found, expected = linear(x, weight, *rest, packed=packed), F.linear(x, weight, *rest)
    assert found.dtype == dtype
    assert_close(found, expected, **close)
    above = torch.linspace(-1, 1, found.numel()).view_as(found).to(dtype)
    assert_close(torch.autograd.grad(found, x, above), torch.autograd.grad(expected, x, above), **close)
    with torch.no_grad():
        assert_close(linear(x, weight, *rest, packed=packed), expected, **close)


def test_autocast_decides_whether_a_weight_is_prepacked() -> None:
    """Where it computes in the weight's precision; a wider input is then narrowed, as autocast would."""
    x, weight = (tensor.detach() for tensor in inputs((3, 7), False, False))
    half = weight.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert prepacked(weight) is None
        packed = prepacked(half)
        assert (packed is not None) == bfloat16_is_native()
        found = linear(x, half, packed=packed)
        assert_close(found, F.linear(x, half), atol=0.05, rtol=0.02)
    assert found.dtype == torch.bfloat16
    assert prepacked(weight.double()) is None


@pytest.mark.parametrize(
    ("amd", "instructions", "expected"),
    [(True, "AVX512", True), (True, "AVX2", False), (False, "AVX512", False), (False, "DEFAULT", False)],
)
def test_the_processor_alone_decides_which_library_multiplies(
    amd: bool, instructions: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement could decide otherwise in the process that resumes a run, and change its bits."""
    monkeypatch.setattr(kernel, "_is_amd", lambda: amd)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    assert onednn_is_faster.__wrapped__() is expected


def test_float32_goes_the_faster_way_and_bfloat16_one_way_on_a_processor(onednn: bool, native: bool) -> None:
    assert [by_onednn(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)] == [onednn, native, False]


def adapter(dtype: torch.dtype, rows: tuple[int, ...]) -> list[Tensor]:
    """A layer's output, its input, and the two matrices of an adapter."""
    draws = torch.Generator().manual_seed(0)
    shapes = [(*rows, 5), (*rows, 7), (2, 7), (5, 2)]
    return [torch.randn(shape, generator=draws).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [(9,), (2, 3), (0,)])
def test_an_adapter_is_added_as_in_plain_products(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """With the gradients of all four tensors."""
    given = adapter(dtype, rows)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found = low_rank(*given, 1.5)
    base, x, a, b = exact
    wanted = base + 1.5 * x @ a.t() @ b.t()
    above = torch.linspace(-1, 1, found.numel()).view_as(found).to(dtype)
    close = CLOSE if dtype != torch.bfloat16 else {"atol": 0.05, "rtol": 0.02}
    assert found.dtype == dtype
    assert_close(found.double(), wanted, **close)
    gradients = torch.autograd.grad(found, given, above)
    expected = torch.autograd.grad(wanted, exact, above.double())
    assert_close([g.double() for g in gradients], list(expected), **close)


def test_of_an_adapter_only_what_trains_gets_a_gradient() -> None:
    for trained in range(4):
        given = [t.detach().requires_grad_(i == trained) for i, t in enumerate(adapter(torch.float32, (9,)))]
        low_rank(*given, 1.5).sum().backward()
        assert [tensor.grad is not None for tensor in given] == [i == trained for i in range(4)]


def test_the_gradient_of_an_adapter_is_not_differentiated_again() -> None:
    given = adapter(torch.float32, (9,))
    (slope,) = torch.autograd.grad(low_rank(*given, 1.5).square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


def test_few_sizes_hold_every_count_with_little_to_spare() -> None:
    """At most a 32nd more; 32 sizes from a power of two to the next; a size is its own size."""
    for count in range(1, 3000):
        size = few_sizes(count)
        assert count <= size <= count + count / 32
        assert few_sizes(size) == size
    for power in (5, 8, 11):
        assert len({few_sizes(count) for count in range(2**power, 2 ** (power + 1))} - {2 ** (power + 1)}) == 32
    assert few_sizes(0) == 0
