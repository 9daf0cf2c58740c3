"""One weight per token of the whole minibatch: cutting it up afterward changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from src.core.aggregation import constant_length, sequence_mean, token_mean, weighted_sum
from src.core.logprobs import entropy_from_logits, logprobs_from_logits
from src.core.masking import masked_mean
from src.core.policy_losses import clipped_surrogate
from src.core.value_losses import clipped_squared_error

LENGTHS = [7, 2, 1, 5, 0, 3]  # one row in which nothing counts
HIDDEN, VOCABULARY = 4, 6

Batch = dict[str, Tensor]
Term = Callable[[Tensor, Batch], Tensor]


def policy(parameters: Tensor, batch: Batch) -> Tensor:
    """PPO-clip of a linear policy."""
    logprobs = logprobs_from_logits(batch["hidden"] @ parameters, batch["ids"])
    return clipped_surrogate(logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"], 0.2, 0.2)[0]


def value(parameters: Tensor, batch: Batch) -> Tensor:
    """Clipped regression of a linear critic."""
    values = (batch["hidden"] @ parameters)[..., 0]
    return clipped_squared_error(values, batch["old_values"], batch["returns"], batch["mask"], 0.2)[0]


def entropy(parameters: Tensor, batch: Batch) -> Tensor:
    """Entropy of a linear policy."""
    return entropy_from_logits(batch["hidden"] @ parameters)


terms = pytest.mark.parametrize("term", [policy, value, entropy])


@pytest.fixture
def parameters() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(HIDDEN, VOCABULARY, dtype=torch.float64, generator=generator, requires_grad=True)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    names = ("old_values", "returns", "advantages")
    floats = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name in names}
    return floats | {
        "hidden": torch.randn(*shape, HIDDEN, dtype=torch.float64, generator=generator),
        "ids": torch.randint(0, VOCABULARY, shape, generator=generator),
        "old_logprobs": -2 * torch.rand(shape, dtype=torch.float64, generator=generator),
        "mask": torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1),
    }


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """Cut into rows, each piece trimmed to its longest response (at least one token wide)."""
    pieces = []
    for start in range(0, len(LENGTHS), size):
        width = max(1, *LENGTHS[start : start + size])
        pieces.append({name: x[start : start + size, :width] for name, x in batch.items()})
    return pieces


def loss_and_gradient(term: Term, parameters: Tensor, pieces: list[Batch]) -> tuple[Tensor, Tensor]:
    """Each piece backward by itself, as in training."""
    total = torch.zeros((), dtype=torch.float64)
    gradient = torch.zeros_like(parameters)
    for piece in pieces:
        loss = weighted_sum(term(parameters, piece), piece["weights"], piece["mask"])
        gradient += torch.autograd.grad(loss, parameters)[0]
        total += loss.detach()
    return total, gradient


@terms
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_micro_batches_change_neither_loss_nor_gradient(
    term: Term, parameters: Tensor, batch: Batch, size: int
) -> None:
    """Checklist 47. Ragged lengths, trimmed pieces, one of them without a counted token (Checklist 12)."""
    batch["weights"] = token_mean(batch["mask"])
    whole = loss_and_gradient(term, parameters, [batch])
    assert_close(loss_and_gradient(term, parameters, micro_batches(batch, size)), whole)


@terms
def test_weights_computed_per_micro_batch_would_be_noticed(term: Term, parameters: Tensor, batch: Batch) -> None:
    """Checklist 47. The mistake itself: a mean of means differs on this batch, so the test above can fail."""
    whole = loss_and_gradient(term, parameters, [batch | {"weights": token_mean(batch["mask"])}])
    pieces = micro_batches(batch, 2)
    for piece in pieces:
        piece["weights"] = token_mean(piece["mask"]) / len(pieces)
    assert not torch.allclose(loss_and_gradient(term, parameters, pieces)[1], whole[1], rtol=1e-2)


@terms
def test_order_within_the_minibatch_changes_nothing(term: Term, parameters: Tensor, batch: Batch) -> None:
    """Checklist 47."""
    batch["weights"] = token_mean(batch["mask"])
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    shuffled = {name: x[order] for name, x in batch.items()}
    assert_close(loss_and_gradient(term, parameters, [shuffled]), loss_and_gradient(term, parameters, [batch]))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1)))
def test_token_mean_weighs_every_token_the_same(rows: list[list[bool]]) -> None:
    """Checklist 12. 1/n for each of n counted tokens, 0 elsewhere; all 0 when none counts."""
    counted = sum(map(sum, rows))
    expected = [[1 / counted if counts else 0.0 for counts in row] for row in rows]
    assert_close(token_mean(torch.tensor(rows)), torch.tensor(expected))


def test_token_mean_reduces_weighted_sum_to_the_masked_mean(batch: Batch) -> None:
    """Checklist 47. And equals the plain mean of the counted tokens."""
    x, mask = batch["returns"], batch["mask"]
    mean = weighted_sum(x, token_mean(mask), mask)
    assert_close(mean, masked_mean(x, mask))
    assert_close(mean, x[mask].mean())


def test_weighted_sum_is_a_dot_product_over_what_counts() -> None:
    """Checklist 11. Also with weights that are no mean; the uncounted 100 stays out whatever its weight."""
    x = torch.tensor([[1.0, 2.0, 100.0]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[0.5, 3.0, 1.0]])
    total = weighted_sum(x, weights, torch.tensor([[True, True, False]]))
    assert_close(total.detach(), torch.tensor(6.5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(total, x)
    assert_close(gradient, torch.tensor([[0.5, 3.0, 0.0]], dtype=torch.float64))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1)))
def test_sequence_mean_weighs_every_response_the_same(rows: list[list[bool]]) -> None:
    """Checklist 12. 1 / (N |row|), N the rows in which a token counts; all 0 when there is none."""
    responses = sum(map(any, rows))
    expected = [[1 / (responses * sum(row)) if counts else 0.0 for counts in row] for row in rows]
    assert_close(sequence_mean(torch.tensor(rows)), torch.tensor(expected))


def test_sequence_mean_is_a_mean_of_means(batch: Batch) -> None:
    """Checklist 47. Of the rows in which a token counts; by token it would be another number on ragged rows."""
    x, mask = batch["returns"], batch["mask"]
    means = torch.stack([row[counts].mean() for row, counts in zip(x, mask, strict=True) if counts.any()])
    by_response = weighted_sum(x, sequence_mean(mask), mask)
    assert_close(by_response, means.mean(), rtol=1e-6, atol=1e-7)  # the weights are float32
    assert abs(by_response - weighted_sum(x, token_mean(mask), mask)) > 1e-2


@pytest.mark.parametrize("length", [7, 64])
def test_constant_length_divides_by_what_no_response_can_change(batch: Batch, length: int) -> None:
    """A sum over each response over one length, and a mean over all rows, the empty one included."""
    x, mask = batch["returns"], batch["mask"]
    sums = [row[counts].sum().item() for row, counts in zip(x, mask, strict=True)]
    actual = weighted_sum(x, constant_length(mask, length), mask)
    expected = torch.tensor(sum(sums) / length / len(sums), dtype=torch.float64)
    assert_close(actual, expected, rtol=1e-6, atol=1e-7)  # the weights are float32


def test_constant_length_weighs_a_token_the_same_however_long_its_response() -> None:
    """Unlike `sequence_mean`, which weighs the token of a short response more (the bias that Dr. GRPO removes)."""
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    assert_close(constant_length(mask, 4), mask / 8)
    assert_close(sequence_mean(mask), mask / torch.tensor([[8.0], [2.0]]))


def test_full_rows_are_all_the_same() -> None:
    """Where no row is shorter than the others all three are the plain mean."""
    mask = torch.ones(3, 5, dtype=torch.bool)
    for weights in (token_mean(mask), sequence_mean(mask), constant_length(mask, 5)):
        assert_close(weights, torch.full((3, 5), 1 / 15))
