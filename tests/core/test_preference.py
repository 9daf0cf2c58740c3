"""The Bradley-Terry loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from src.core.preference import centering, imitation, pairwise_accuracy, pairwise_loss

score = st.floats(-15, 15)
quick = settings(deadline=None, derandomize=True, max_examples=60)


@quick
@given(score, score)
def test_probabilities_of_both_orders_sum_to_one(chosen: float, rejected: float) -> None:
    """Checklist 27. exp(-loss) is P(chosen preferred) = 1 / (1 + exp(-(r_w - r_l))); swapped, the rest of it."""
    w, l = torch.tensor([chosen], dtype=torch.float64), torch.tensor([rejected], dtype=torch.float64)  # noqa: E741
    probability = (-pairwise_loss(w, l)).exp()
    assert probability.item() == pytest.approx(1 / (1 + math.exp(rejected - chosen)), rel=1e-9)
    assert (probability + (-pairwise_loss(l, w)).exp()).item() == pytest.approx(1.0)


def test_log_2_at_a_tie() -> None:
    """Checklist 26."""
    scores = torch.tensor([0.0, 3.0, -40.0])
    assert_close(pairwise_loss(scores, scores), torch.full((3,), math.log(2)))


@pytest.mark.parametrize("difference", [-1e4, -100.0, 100.0])
def test_finite_at_any_difference(difference: float) -> None:
    """Checklist 26. log(1 + exp(100)) is infinite in float32; the loss there is -difference, its slope -1 (or 0)."""
    chosen = torch.tensor([difference], requires_grad=True)
    loss = pairwise_loss(chosen, torch.zeros(1))
    assert_close(loss.detach(), torch.tensor([max(-difference, 0.0)]))
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    assert_close(gradient, torch.tensor([-1.0 if difference < 0 else 0.0]))


def test_gradient() -> None:
    """Checklist 26. dL/dr_w = -(1 - P) = -dL/dr_l: pairs already well told apart push little."""
    chosen = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(pairwise_loss(chosen, rejected).sum(), (chosen, rejected))
    expected = -torch.tensor([1 / (1 + math.exp(d)) for d in (1.5, 0.0, -4.0)], dtype=torch.float64)
    assert_close(gradients[0], expected)
    assert_close(gradients[1], -expected)


def test_only_the_difference_counts() -> None:
    """Checklist 27. A constant added to all scores of the model changes no loss."""
    chosen, rejected = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    assert_close(pairwise_loss(chosen + 7, rejected + 7), pairwise_loss(chosen, rejected))


def test_each_pair_is_judged_by_itself() -> None:
    """Checklist 27. In a batch, alone, or in another order."""
    chosen, rejected = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([0.5, 3.0, 0.3])
    whole = pairwise_loss(chosen, rejected)
    assert_close(
        torch.cat([pairwise_loss(w, r) for w, r in zip(chosen.split(1), rejected.split(1), strict=True)]), whole
    )
    assert_close(pairwise_loss(chosen.flip(0), rejected.flip(0)), whole.flip(0))


def test_accuracy() -> None:
    """Checklist 27. 1, 0.5, 0; swapping the labels gives what is left to 1."""
    chosen, rejected = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 1.5])
    assert_close(pairwise_accuracy(chosen, rejected), torch.tensor([1.0, 0.5, 0.0]))
    assert_close(pairwise_accuracy(rejected, chosen), 1 - pairwise_accuracy(chosen, rejected))


def test_a_margin_asks_for_a_larger_difference() -> None:
    """L(r_w - r_l - m): the same as without margin at a difference that is smaller by m; log 2 at the margin itself."""
    chosen, rejected = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.5, 1.0, 3.0])
    margin = torch.tensor([0.5, 1.0, 2.0])
    assert_close(pairwise_loss(chosen, rejected, margin), pairwise_loss(chosen - margin, rejected))
    assert pairwise_loss(torch.tensor([3.0]), torch.tensor([1.0]), 2.0).item() == pytest.approx(math.log(2))


def test_centering_pulls_both_scores_and_leaves_the_difference() -> None:
    """Its gradient is 2 (r_w + r_l) for both: common drift is undone, the difference is not touched."""
    scores = torch.tensor([[3.0, 1.0], [-2.0, 0.5]], requires_grad=True)
    losses = centering(scores[:, 0], scores[:, 1])
    losses.sum().backward()
    assert_close(losses.detach(), torch.tensor([16.0, 2.25]))
    assert_close(scores.grad, torch.tensor([[8.0, 8.0], [-3.0, -3.0]]))


def test_imitation_is_the_mean_cross_entropy_and_its_gradient_that_of_the_softmax() -> None:
    """d/dz of the mean of -log softmax(z)[y] is (softmax(z) - onehot(y)) / N, derived by hand."""
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.0, -0.5]], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([2, 1])
    loss = imitation(logits.log_softmax(dim=-1)[torch.arange(2), ids])
    loss.backward()
    z = logits.detach()
    assert loss.item() == pytest.approx(sum((z[i].exp().sum().log() - z[i, ids[i]]).item() for i in (0, 1)) / 2)
    assert_close(logits.grad, (z.exp() / z.exp().sum(1, keepdim=True) - torch.eye(3, dtype=torch.float64)[ids]) / 2)


def test_nothing_to_imitate_costs_nothing() -> None:
    assert imitation(torch.zeros(0)).item() == 0
