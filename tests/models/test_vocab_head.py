"""The head without kept logits against the plain path: logits, log_softmax and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.testing import assert_close

from src.core.logprobs import entropy_from_logits, logprobs_from_logits
from src.kernels.fast_layers import Linear
from src.kernels.linear import few_sizes
from src.models import vocab_head as blocks
from src.models.vocab_head import head_logprobs, token_logprobs

TOKENS, WIDTH = 7, 6


@pytest.fixture(autouse=True, params=[1, 4, 512], ids=["word by word", "four words", "in one block"])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Words worked on at a time."""
    monkeypatch.setattr(blocks, "NARROWEST", request.param)
    monkeypatch.setattr(blocks, "IN_CACHE", 1)
    return int(request.param)


def case(vocabulary: int, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor]:
    draws = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, vocabulary, bias=bias).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    hidden = torch.randn(TOKENS, WIDTH, generator=draws)
    ids = torch.randint(0, vocabulary, (TOKENS,), generator=draws)
    return hidden.to(dtype).requires_grad_(True), head.to(dtype), ids


def plain(hidden: Tensor, head: nn.Linear, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    return logprobs_from_logits(logits, ids, temperature), entropy_from_logits(logits, temperature)


def mixed(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """A different weight for every token and for both numbers."""
    weights = torch.linspace(-1, 2, TOKENS, dtype=logprobs.dtype)
    return (weights * logprobs).sum() + (weights.flip(0) * entropy).sum()


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("vocabulary", [11, 64, 130])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_numbers_and_gradients_are_those_of_the_plain_path(
    frozen: bool, vocabulary: int, bias: bool, temperature: float
) -> None:
    """Checklist 14, 53. For hidden states, weights and biases; whether or not rows of logits need filling up."""
    hidden, head, ids = case(vocabulary, bias)
    head.requires_grad_(not frozen)
    found = head_logprobs(hidden, head.weight, head.bias, ids, temperature, True)
    expected = plain(hidden, head, ids, temperature)
    asked = [hidden, *([] if frozen else head.parameters())]
    assert_close(found, expected, atol=1e-12, rtol=0)
    assert_close(
        torch.autograd.grad(mixed(*found), asked), torch.autograd.grad(mixed(*expected), asked), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_an_entropy_that_is_only_looked_at_has_no_gradient(frozen: bool) -> None:
    """The logprobs' gradient is the same with it and without."""
    hidden, head, ids = case(11, False)
    head.requires_grad_(not frozen)
    logprobs, entropy = head_logprobs(hidden, head.weight, None, ids, 0.8, False)
    assert not entropy.requires_grad
    (expected,) = torch.autograd.grad(plain(hidden, head, ids, 0.8)[0].sum(), [hidden])
    assert_close(torch.autograd.grad(logprobs.sum(), [hidden])[0], expected, atol=1e-12, rtol=0)
    assert_close(entropy, plain(hidden, head, ids, 0.8)[1], atol=1e-12, rtol=0)


def test_half_precision_is_raised_before_the_softmax() -> None:
    """Checklist 14. What is exact about the half-precision logits stays: float32 results of the very same logits."""
    hidden, head, ids = case(130, False, torch.bfloat16)
    found = head_logprobs(hidden, head.weight, None, ids, 1.0, True)
    logits = head(hidden).float()
    assert [x.dtype for x in found] == [torch.float32, torch.float32]
    assert_close(found[0], logits.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1), atol=1e-5, rtol=0)
    assert torch.autograd.grad(mixed(*found), [hidden])[0].dtype == torch.bfloat16


def test_autocast_does_not_reach_the_sum_over_the_vocabulary() -> None:
    """Checklist 14. Only the product with the weights is in half precision, and that before."""
    hidden, head, ids = case(130, False, torch.bfloat16)
    expected = head_logprobs(hidden, head.weight, None, ids, 1.0, True)
    with torch.autocast("cpu", torch.bfloat16):
        found = head_logprobs(hidden, head.weight, None, ids, 1.0, True)
    assert all(map(torch.equal, found, expected))
    assert_close(found[1], entropy_from_logits(head(hidden)), atol=1e-4, rtol=0)


def test_huge_logits_overflow_nothing() -> None:
    hidden, head, ids = case(11, False)
    found = head_logprobs(hidden * 1e4, head.weight, None, ids, 1.0, True)
    assert_close(found, plain(hidden * 1e4, head, ids, 1.0), atol=1e-8, rtol=0)
    assert torch.autograd.grad(mixed(*found), [hidden])[0].isfinite().all()


def test_a_second_derivative_is_refused() -> None:
    hidden, head, ids = case(11, False)
    logprobs, _ = head_logprobs(hidden, head.weight, None, ids, 1.0, True)
    (once,) = torch.autograd.grad((logprobs**2).sum(), [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_no_more_words_are_scored_at_a_time(frozen: bool, width: int) -> None:
    """Or the comparisons above compare nothing; and what is held does not grow with the vocabulary."""
    seen: list[int] = []

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        if x.shape == (TOKENS, WIDTH):
            seen.append(len(weight))
        return linear(x, weight)

    hidden, head, ids = case(130, True)
    head.requires_grad_(not frozen)
    mixed(*head_logprobs(hidden, head.weight, head.bias, ids, 1.0, True, noted)).backward()
    once = [width] * (130 // width) + [130 % width] * (130 % width > 0)
    assert seen == (once if frozen else once * 2)


def test_scores_that_grow_from_block_to_block_and_far_apart_lose_nothing() -> None:
    """The largest score so far, which all sums lean on, rises by hundreds with each word."""
    scores = torch.arange(40, dtype=torch.float64).unsqueeze(1) * 300
    hidden, ids = torch.ones(40, 1, dtype=torch.float64), torch.arange(40)
    logprobs, entropy = head_logprobs(hidden, scores, None, ids, 1.0, True)
    assert_close(logprobs, (scores - scores.max()).squeeze(1), atol=1e-9, rtol=0)
    assert_close(entropy, torch.zeros(40, dtype=torch.float64), atol=1e-9, rtol=0)
    near = head_logprobs(hidden, scores / 300, None, ids, 1.0, True)
    logits = (scores / 300).squeeze(1).expand(40, 40)
    assert_close(near, (logprobs_from_logits(logits, ids), entropy_from_logits(logits)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_fast_head_is_given_rows_that_suit_it_and_its_own_product(frozen: bool) -> None:
    """65 tokens are worked on as 66; what is added has no weight in any gradient."""
    seen: set[int] = set()

    class Noted(Linear):
        @staticmethod
        def product(x: Tensor, weight: Tensor) -> Tensor:
            seen.add(len(x))
            return linear(x, weight)

    draws = torch.Generator().manual_seed(3)
    hidden = torch.randn(65, WIDTH, generator=draws, dtype=torch.float64, requires_grad=True)
    ids, slopes = torch.randint(0, 11, (65,), generator=draws), torch.linspace(-1, 2, 65, dtype=torch.float64)
    _, head, _ = case(11, True)
    head.requires_grad_(not frozen)
    asked = [hidden, *([] if frozen else head.parameters())]
    expected = plain(hidden, head, ids, 0.7)
    slope = torch.autograd.grad((slopes * (expected[0] + 0.3 * expected[1])).sum(), asked)
    head.__class__ = Noted
    found = token_logprobs(head, hidden, ids, 0.7, entropy_trains=True)
    assert_close(found, expected, atol=1e-12, rtol=0)
    found_slope = torch.autograd.grad((slopes * (found[0] + 0.3 * found[1])).sum(), asked)
    assert_close(found_slope, slope, atol=1e-12, rtol=0)
    assert few_sizes(65) == 66
    assert 66 in seen
    assert 65 not in seen


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_no_tokens_give_no_numbers(fast: bool) -> None:
    """And gradients of zero: a rank may have no rows."""
    hidden, head, ids = case(11, True)
    head.__class__ = Linear if fast else nn.Linear
    logprobs, entropy = token_logprobs(head, hidden[:0], ids[:0])
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_products_are_in_its_precision(dtype: torch.dtype) -> None:
    """Checklist 14. As a plain layer's are; the numbers are float32 either way."""
    hidden, head, ids = case(130, True, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(head, hidden, ids)
        logits = head(hidden)
    assert logits.dtype == torch.bfloat16
    expected = head_logprobs(hidden.bfloat16(), head.weight.bfloat16(), head.bias, ids, 1.0, False)
    assert_close(found, expected, atol=0, rtol=0)
    assert found[0].dtype == torch.float32
