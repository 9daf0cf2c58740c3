"""GSPO: the loss written per token against the paper's loss of whole responses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.core.aggregation import sequence_mean, weighted_sum
from src.core.policy_losses import SequenceClippedSurrogate, clipped_surrogate, sequence_clipped_surrogate
from src.errors import SettingError

LOW, HIGH = 0.05, 0.1
LENGTHS = [6, 2, 4, 0, 1, 3]
# mean log-ratio of each response: inside, above, below, empty, above, below; both signs of A meet both bounds
DRIFT = [0.02, 0.3, -0.3, 0.0, 0.4, -0.5]
SIGNS = [1.5, 1.0, 0.7, 1.0, -2.0, -1.2]


class Case:
    """Ragged responses of a softmax policy that has drifted from the old one as said above."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (len(LENGTHS), max(LENGTHS))
        self.mask = torch.arange(shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)
        self.logits = torch.randn(*shape, 7, dtype=torch.float64, generator=generator, requires_grad=True)
        ids = torch.randint(0, 7, (*shape, 1), generator=generator)
        self.logprobs = self.logits.log_softmax(-1).gather(-1, ids).squeeze(-1)
        noise = 0.2 * torch.randn(shape, dtype=torch.float64, generator=generator) * self.mask
        noise = noise - noise.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp(min=1)
        self.old = self.logprobs.detach() - (noise + torch.tensor(DRIFT, dtype=torch.float64).unsqueeze(1))
        self.scores = torch.tensor(SIGNS, dtype=torch.float64)
        self.advantages = self.scores.unsqueeze(1).expand(shape).clone()

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0]

    def loss(self, advantages: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
        losses, _ = sequence_clipped_surrogate(self.logprobs, self.old, advantages, self.mask, low, high)
        return weighted_sum(losses, sequence_mean(self.mask), self.mask)


@pytest.fixture
def case() -> Case:
    return Case()


def loss_of_the_paper(case: Case, low: float, high: float) -> tuple[Tensor, list[bool]]:
    """-1/N sum_i min(s_i A_i, clip(s_i) A_i), s_i = (pi(y_i) / pi_old(y_i))^(1/|y_i|), response by response (eq. 5)."""
    objectives, clipped = [], []
    for i, length in enumerate(LENGTHS):
        if length == 0:
            continue
        ratio = (case.logprobs[i, :length].sum() / length - case.old[i, :length].sum() / length).exp()
        bounded = min(max(ratio.item(), 1 - low), 1 + high) * SIGNS[i]
        clipped.append(bounded < ratio.item() * SIGNS[i])
        objectives.append(torch.tensor(bounded, dtype=torch.float64) if clipped[-1] else ratio * SIGNS[i])
    return -torch.stack(objectives).mean(), clipped


@pytest.mark.parametrize(
    ("low", "high", "clipped"),
    [
        pytest.param(LOW, HIGH, [False, True, False, False, True], id="tight"),
        pytest.param(0.9, 0.35, [False, False, False, False, False], id="wide"),
        pytest.param(1e-3, 1e-3, [True, True, False, False, True], id="hardly-any"),
    ],
)
def test_value_and_gradient_are_those_of_the_paper(case: Case, low: float, high: float, clipped: list[bool]) -> None:
    """Checklist 43. Away from the old policy, ragged, clipped responses among them; responses averaged."""
    expected, was_clipped = loss_of_the_paper(case, low, high)
    actual = case.loss(case.advantages, low, high)
    assert was_clipped == clipped
    # sequence_mean's weights are float32: a relative error of 1e-7 each
    assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert_close(case.gradient(actual), case.gradient(expected), rtol=1e-6, atol=1e-7)
    assert case.gradient(expected).ne(0).any()


def test_a_response_is_clipped_as_a_whole(case: Case) -> None:
    """Checklist 43. Every counted token of a clipped response, none of the others, and none of the empty one."""
    _, indicators = sequence_clipped_surrogate(case.logprobs, case.old, case.advantages, case.mask, LOW, HIGH)
    clipped = torch.tensor([False, True, False, False, False, True]).unsqueeze(1)
    assert_close(indicators["clip_fraction"], (clipped & case.mask).double())
    ratio = (case.logprobs - case.old).detach().exp()[case.mask]
    assert (ratio > 1 + HIGH).any()  # tokens of the first response, which PPO would have clipped each by itself
    gradient = case.gradient(case.loss(case.advantages))
    assert_close(gradient.abs().sum((1, 2)).gt(0), torch.tensor([True, False, True, False, True, False]))


def test_every_token_of_a_response_has_the_same_loss(case: Case) -> None:
    """Its value is that of the whole response, whatever the token's own ratio."""
    losses, _ = sequence_clipped_surrogate(case.logprobs, case.old, case.advantages, case.mask, LOW, HIGH)
    for i, length in enumerate(LENGTHS):
        ratio = math.exp(DRIFT[i])
        objective = min(ratio * SIGNS[i], min(max(ratio, 1 - LOW), 1 + HIGH) * SIGNS[i])
        expected = torch.full((length,), -objective, dtype=torch.float64)
        assert_close(losses[i, :length].detach(), expected)


def test_unequal_advantages_weigh_the_tokens_of_a_response(case: Case) -> None:
    """GSPO-token (eq. 13 to 16): the slope of a token is -s_i A_t where s_i is inside the bounds."""
    advantages = torch.randn(case.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    logprobs = case.logprobs.detach().requires_grad_()
    losses, _ = sequence_clipped_surrogate(logprobs, case.old, advantages, case.mask, 0.9, 9.0)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    ratio = torch.tensor(DRIFT, dtype=torch.float64).exp().unsqueeze(1)
    assert_close(gradient, -ratio * advantages * case.mask)


def test_responses_of_one_token_are_those_of_ppo(case: Case) -> None:
    """With a single token the geometric mean is the ratio itself."""
    first = torch.arange(max(LENGTHS)).eq(0) & case.mask
    actual, expected = (
        loss(case.logprobs, case.old, case.advantages, first, LOW, HIGH)
        for loss in (sequence_clipped_surrogate, clipped_surrogate)
    )
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])
    assert_close(case.gradient(actual[0].sum()), case.gradient(expected[0].sum()))


def test_gaps_do_not_count(case: Case) -> None:
    """Checklist 37. The mean is over the counted tokens, wherever in the row they stand."""
    wide = torch.zeros(len(LENGTHS), 2 * max(LENGTHS), dtype=torch.bool)
    wide[:, ::2] = case.mask
    spread = [
        torch.full(wide.shape, 9.0, dtype=x.dtype).masked_scatter(wide, x[case.mask])
        for x in (case.logprobs.detach(), case.old, case.advantages)
    ]
    losses, _ = sequence_clipped_surrogate(*spread, wide, LOW, HIGH)
    expected, _ = sequence_clipped_surrogate(case.logprobs.detach(), case.old, case.advantages, case.mask, LOW, HIGH)
    assert_close(losses[:, ::2], expected)


def test_the_object_applies_its_function_and_refuses_an_empty_range(case: Case) -> None:
    """The paper's bounds of 3e-4 and 4e-4 are allowed."""
    actual = SequenceClippedSurrogate(LOW, HIGH)(case.logprobs, case.old, case.advantages, case.mask)
    expected = sequence_clipped_surrogate(case.logprobs, case.old, case.advantages, case.mask, LOW, HIGH)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])
    assert SequenceClippedSurrogate(3e-4, 4e-4).clip_high == 4e-4
    with pytest.raises(SettingError, match="clip_low"):
        SequenceClippedSurrogate(0.0, 0.1)
