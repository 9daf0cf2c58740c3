"""Weights for what another policy sampled: by hand, in the limit of equal policies, and that they undo the sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.core.correction import Masked, Truncated, effective_sample_size, sequence_ratio
from src.core.policy_losses import Surrogate, probability_ratio
from src.errors import SettingError

MASK = torch.tensor([[True, True, True], [True, True, False]])
RATIOS = torch.tensor([[0.25, 3.0, 1.5], [0.8, 1.25, 7.0]], dtype=torch.float64)  # 7: outside the mask
BEHAVIOR = torch.full((2, 3), -3.0, dtype=torch.float64)
WORDS, LENGTH = 3, 2


@pytest.mark.parametrize(
    ("correction", "weights", "bounded"),
    [
        (Truncated(2.0), [[0.25, 2.0, 1.5], [0.8, 1.25, 0]], [[0, 1, 0], [0, 0, 0]]),
        (Masked(2.0), [[0, 0, 1.5], [0.8, 1.25, 0]], [[1, 1, 0], [0, 0, 0]]),
        (Truncated(1.1, sequence_ratio), [[1.1, 1.1, 1.1], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]),  # 0.25 * 3 * 1.5
        (Masked(1.1, sequence_ratio), [[0, 0, 0], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]),
        (Truncated(math.inf, sequence_ratio), [[1.125, 1.125, 1.125], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_weights_are_those_worked_out_by_hand(
    correction: Truncated, weights: list[list[float]], bounded: list[list[float]]
) -> None:
    found = correction(BEHAVIOR + RATIOS.log(), BEHAVIOR, MASK)
    assert_close(found, (torch.tensor(weights).double(), torch.tensor(bounded).double()))


@pytest.mark.parametrize("ratio", [probability_ratio, sequence_ratio])
@pytest.mark.parametrize("kind", [Truncated, Masked])
def test_equal_policies_weigh_exactly_one(kind: type[Truncated], ratio: Callable[..., Tensor]) -> None:
    """So a loss that is multiplied by it keeps its bits."""
    logprobs = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    weights, bounded = kind(2.0, ratio)(logprobs, logprobs.clone(), MASK)
    assert torch.equal(weights, MASK.float())
    assert not bounded.any()


def test_a_ratio_beyond_all_bounds_stays_a_number() -> None:
    far = torch.full((1, 3), 1e4)
    for sign in (1, -1):
        found = sequence_ratio(sign * far, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))
        assert_close(found, torch.full((1, 3), math.exp(sign * 20)))


def test_a_cap_that_bounds_the_right_weight_is_refused() -> None:
    for kind in (Truncated, Masked):
        with pytest.raises(SettingError, match="cap"):
            kind(1.0)


def expected_gradient(ratio: Callable[..., Tensor] | None, length: int, of_old: bool) -> Tensor:
    """E[sum_t w_t grad L_t] over every response of `length` tokens, its probability that of old or behavior policy.

    The loss is the surrogate, with an advantage for each token that depends on the whole response.
    """
    draws = torch.Generator().manual_seed(3)
    states = 1 + WORDS  # the start, and each first word
    old, behavior = (torch.randn(states, WORDS, dtype=torch.float64, generator=draws) for _ in range(2))
    policy = old.clone().requires_grad_()
    ids = torch.tensor(list(product(range(WORDS), repeat=length)))
    before = torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), 1 + ids[:, :-1]], dim=1)
    advantages = torch.randn(ids.shape, dtype=torch.float64, generator=draws)
    mask = torch.ones(ids.shape, dtype=torch.bool)
    logprobs, old_logprobs, behavior_logprobs = (
        logits.log_softmax(1)[before, ids] for logits in (policy, old, behavior)
    )
    losses, _ = Surrogate()(logprobs, old_logprobs, advantages, mask)
    if ratio is not None:
        losses = Truncated(math.inf, ratio)(old_logprobs, behavior_logprobs, mask)[0] * losses
    probability = (old_logprobs if of_old else behavior_logprobs).sum(1).exp()
    (gradient,) = torch.autograd.grad((probability.detach() * losses.sum(1)).sum(), policy)
    return gradient


def test_without_a_cap_the_weights_undo_that_another_policy_sampled() -> None:
    """E_behavior[w grad L] = E_old[grad L]: for whole responses always, for single tokens when nothing came before."""
    wanted = expected_gradient(None, LENGTH, of_old=True)
    assert_close(expected_gradient(sequence_ratio, LENGTH, of_old=False), wanted, rtol=0, atol=1e-14)
    for ratio in (None, probability_ratio):  # biased: the test would notice
        assert (expected_gradient(ratio, LENGTH, of_old=False) - wanted).abs().max() > 0.01
    wanted = expected_gradient(None, 1, of_old=True)
    assert_close(expected_gradient(probability_ratio, 1, of_old=False), wanted, rtol=0, atol=1e-14)


def test_the_effective_sample_size_is_the_share_of_tokens_that_count() -> None:
    one, none = torch.zeros(2, 3), torch.zeros(2, 3)
    one[0, 1] = 4.0
    for weights, share in ((torch.full((2, 3), 0.3), 1.0), (one, 1 / 5), (none, 0.0)):
        assert effective_sample_size(weights, MASK).item() == pytest.approx(share)
    assert effective_sample_size(RATIOS, torch.zeros(2, 3, dtype=torch.bool)) == 0
    w = [0.25, 3.0, 1.5, 0.8, 1.25]
    expected = sum(w) ** 2 / (len(w) * sum(x * x for x in w))
    assert effective_sample_size(RATIOS, MASK).item() == pytest.approx(expected)
