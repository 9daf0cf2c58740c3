"""The head without kept logits against the plain path: logits, log_softmax and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from src.core.logprobs import entropy_from_logits, logprobs_from_logits
from src.kernels.linear import few_sizes
from src.models import vocab_head as blocks
from src.models.vocab_head import head_logprobs

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
def test_no_more_words_are_scored_at_a_time(frozen: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the comparisons above compare nothing; and what is held does not grow with the vocabulary."""
    seen, product = [], blocks.linear

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        result = product(x, weight)
        if x.shape == (TOKENS, WIDTH):
            seen.append(result.shape[1])
        return result

    monkeypatch.setattr(blocks, "linear", noted)
    hidden, head, ids = case(130, True)
    head.requires_grad_(not frozen)
    mixed(*head_logprobs(hidden, head.weight, head.bias, ids, 1.0, True)).backward()
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


def test_a_number_of_tokens_that_is_filled_up_changes_nothing() -> None:
    """65 tokens are worked on as 66; what is added has no weight in any gradient."""
    draws = torch.Generator().manual_seed(3)
    hidden = torch.randn(65, WIDTH, generator=draws, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, WIDTH, generator=draws, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (65,), generator=draws)
    assert few_sizes(65) == 66
    logits = hidden @ weight.t()
    expected = logprobs_from_logits(logits, ids), entropy_from_logits(logits)
    found = head_logprobs(hidden, weight, None, ids, 1.0, True)
    assert_close(found, expected, atol=1e-12, rtol=0)
    slopes = torch.linspace(-1, 2, 65, dtype=torch.float64)
    for trained in ([hidden, weight], [hidden]):
        frozen = head_logprobs(hidden, weight if len(trained) == 2 else weight.detach(), None, ids, 1.0, True)
        gradients = [torch.autograd.grad((slopes * (a + 0.3 * b)).sum(), trained) for a, b in (frozen, expected)]
        expected = logprobs_from_logits(hidden @ weight.t(), ids), entropy_from_logits(hidden @ weight.t())
        assert_close(*gradients, atol=1e-12, rtol=0)
