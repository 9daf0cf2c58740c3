"""The kept distribution against plain log_softmax, in one piece and in several, and the look back at an old policy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from src.memory.estimate import peak_of
from src.models import distribution
from src.models.distribution import TokenDistribution
from src.models.roles import Roles
from src.models.settings import LoraSettings
from src.types import Rollout
from tests.tiny import (
    FOREIGN_WARNINGS,
    LORA,
    assert_rows_close,
    make_roles,
    plain_model,
    ragged_rollout,
    rows_of,
    same_bits,
    snapshot,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

KINDS = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
WIDTH, VOCABULARY, TEMPERATURE = 6, 11, 0.7
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
TOKENS = int(MASK.sum())


def random_distribution(seed: int, temperature: float = TEMPERATURE) -> TokenDistribution:
    """Eight tokens with a head of their own, in double precision."""
    draws = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=draws))
    hidden = torch.randn(TOKENS, WIDTH, generator=draws).double().requires_grad_(True)
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=draws)
    return TokenDistribution(hidden, head, ids, MASK, temperature)


def plain_rows(tokens: TokenDistribution) -> list[list[float]]:
    """log pi(v | s_t) of each token over the vocabulary, by sums of Python floats."""
    rows = []
    for hidden in tokens.hidden.tolist():
        logits = [sum(map(float.__mul__, hidden, w)) for w in tokens.head.weight.tolist()]
        scaled = [z / tokens.temperature for z in logits]
        top = max(scaled)
        total = top + math.log(sum(math.exp(z - top) for z in scaled))
        rows.append([z - total for z in scaled])
    return rows


def placed(numbers: list[float]) -> Tensor:
    """One number per counted token, put where the mask is True row after row; 0 elsewhere."""
    left = iter(numbers)
    rows = [[next(left) if counted else 0.0 for counted in row] for row in MASK.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def plain_kl(log_p: list[float], log_q: list[float]) -> float:
    """sum_v p_v (log p_v - log q_v)."""
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


@pytest.fixture(params=[2**24, 3 * VOCABULARY, 1], ids=["one piece", "three at a time", "one at a time"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(distribution, "CHUNK", request.param)
    return max(1, request.param // VOCABULARY)


def test_logprobs_and_entropy_are_those_of_plain_python(chunk: int) -> None:
    """Checklist 14, 53. Whatever is done at a time; 0 outside the mask."""
    tokens = random_distribution(1)
    logprobs, entropy = tokens.logprobs_and_entropy()
    rows = plain_rows(tokens)
    taken = [row[token] for row, token in zip(rows, tokens.ids.tolist(), strict=True)]
    atol = {"atol": 1e-10, "rtol": 0}
    assert_close(logprobs, placed(taken), **atol)
    assert_close(entropy, placed([-sum(math.exp(x) * x for x in row) for row in rows]), **atol)
    assert torch.equal(tokens.logprobs(), logprobs)
    assert not logprobs[~MASK].any()
    assert not entropy[~MASK].any()


def test_kl_is_that_of_plain_python_over_the_whole_vocabulary(chunk: int) -> None:
    """Checklist 14, 28. Each side with its own head and temperature; 0 outside the mask."""
    p, q = random_distribution(1), random_distribution(2, temperature=1.3)
    expected = [plain_kl(a, b) for a, b in zip(plain_rows(p), plain_rows(q), strict=True)]
    backwards = [plain_kl(b, a) for a, b in zip(plain_rows(p), plain_rows(q), strict=True)]
    assert_close(p.kl(q), placed(expected), atol=1e-10, rtol=0)
    assert_close(q.kl(p), placed(backwards), atol=1e-10, rtol=0)
    assert abs(sum(expected) - sum(backwards)) > 0.1


def test_the_first_distribution_is_the_one_that_is_averaged_over() -> None:
    """Checklist 28, 57. Two tokens, worked out by hand: KL((0.9, 0.1) || (0.5, 0.5)) and not the other way round."""
    head, ids, mask = nn.Identity(), torch.tensor([0]), torch.tensor([[True]])
    head.weight = torch.eye(2)
    chances = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]], dtype=torch.float64)
    p, q = (TokenDistribution(x.log(), head, ids, mask, 1.0) for x in chances)
    assert p.kl(q).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-12)
    assert q.kl(p).item() == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5), abs=1e-12)


def gradients() -> list[Tensor]:
    """Of a fixed mix of logprobs, entropies and both KLs, with respect to both sides' hidden states and heads."""
    p, q = random_distribution(1), random_distribution(2)
    weights = torch.linspace(-1, 2, MASK.numel()).view(MASK.shape).double()
    logprobs, entropy = p.logprobs_and_entropy()
    total = (weights * (logprobs + 0.3 * entropy + 0.5 * p.kl(q) - 0.2 * q.kl(p))).sum()
    return list(torch.autograd.grad(total, [p.hidden, p.head.weight, q.hidden, q.head.weight]))


def plain_gradients() -> list[Tensor]:
    """The same mix from one log_softmax of all tokens, differentiated by torch."""
    p, q = random_distribution(1), random_distribution(2)
    log_p, log_q = (torch.log_softmax(x.hidden @ x.head.weight.T / TEMPERATURE, dim=1) for x in (p, q))
    weights = torch.linspace(-1, 2, MASK.numel()).view(MASK.shape).double()[MASK]
    taken = log_p[torch.arange(TOKENS), p.ids]
    entropy = -(log_p.exp() * log_p).sum(1)
    there, back = (log_p.exp() * (log_p - log_q)).sum(1), (log_q.exp() * (log_q - log_p)).sum(1)
    total = (weights * (taken + 0.3 * entropy + 0.5 * there - 0.2 * back)).sum()
    return list(torch.autograd.grad(total, [p.hidden, p.head.weight, q.hidden, q.head.weight]))


def test_gradients_are_those_of_one_plain_softmax(chunk: int) -> None:
    """Checklist 3, 47. Pieces are recomputed in the backward pass and change nothing."""
    for actual, expected in zip(gradients(), plain_gradients(), strict=True):
        assert expected.abs().max() > 1e-2
        assert_close(actual, expected, atol=1e-10, rtol=0)


def test_an_exact_kl_never_holds_more_scores_than_a_piece(chunk: int) -> None:
    """Checklist 3. Otherwise the comparisons above compare nothing."""
    tokens, other, sizes = random_distribution(1), random_distribution(2), []
    tokens.head.register_forward_hook(lambda head, inputs, output: sizes.append(len(output)))
    tokens.kl(other)
    whole, rest = divmod(TOKENS, chunk)
    assert sizes == [chunk] * whole + [rest] * (rest > 0)


def test_a_detached_distribution_keeps_its_numbers_when_the_head_is_trained() -> None:
    """Checklist 42, 57. And nothing of it reaches the distribution it was taken of."""
    tokens, other = random_distribution(1), random_distribution(2)
    expected = placed([row[token] for row, token in zip(plain_rows(tokens), tokens.ids.tolist(), strict=True)])
    kept = tokens.detached()
    with torch.no_grad():
        tokens.head.weight += 1
        tokens.head.weight[0] *= 3
    assert (tokens.logprobs() - expected).abs().max() > 0.1
    assert_close(kept.logprobs(), expected, atol=1e-10, rtol=0)
    kept.kl(other).sum().backward()
    assert tokens.hidden.grad is None
    assert tokens.head.weight.grad is None
    assert other.hidden.grad is not None


def test_a_frozen_head_is_not_copied() -> None:
    tokens = random_distribution(1)
    tokens.head.requires_grad_(False)
    assert tokens.detached().head is tokens.head
    assert not tokens.detached().logprobs().requires_grad


def test_a_detached_distribution_asks_for_no_gradient() -> None:
    """Checklist 42. Not even to its own copy of the head."""
    assert not random_distribution(1).detached().logprobs().requires_grad


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


def vocabulary_rows(model: Any, rollout: Rollout) -> list[list[Tensor]]:
    """log pi(v | s_t) over the vocabulary for each response token, row by row, without padding."""
    rows = []
    for row in range(len(rollout.response_ids)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / TEMPERATURE
        rows.append([torch.log_softmax(logits[len(prompt) + t - 1], 0) for t in range(len(response))])
    return rows


def moved_roles(base: str, lora: LoraSettings | None) -> tuple[Roles, list[Tensor], Any]:
    """Roles whose policy went on, copies of the parameters it had, and a plain model that stayed there."""
    roles = make_roles(base, lora, spread=0.1, dtype="float64").double()
    old, plain = snapshot(roles.policy_parameters()), plain_model(roles, "policy")
    noise = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in roles.policy_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    return roles, old, plain


@KINDS
def test_looking_back_gives_the_old_distribution_and_leaves_the_policy_alone(
    base: str, lora: LoraSettings | None
) -> None:
    """Checklist 30, 57. With full fine-tuning the vocabulary head has moved too; critic and reference never."""
    roles, old, plain_old = moved_roles(base, lora)
    rollout, plain_new = ragged_rollout(), plain_model(roles, "policy")
    now = snapshot(list(roles.parameters()))
    found = roles.old_distribution(rollout, TEMPERATURE, old)
    assert same_bits(now, list(roles.parameters()))
    before, after = vocabulary_rows(plain_old, rollout), vocabulary_rows(plain_new, rollout)
    ids = rows_of(rollout.response_ids, rollout.response_mask)
    taken = [[x[a].item() for x, a in zip(*pair, strict=True)] for pair in zip(before, ids, strict=True)]
    assert_rows_close(rows_of(found.logprobs(), rollout.response_mask), taken, 1e-10)
    current = roles.distribution(rollout, TEMPERATURE)
    there = [[plain_kl(p.tolist(), q.tolist()) for p, q in zip(*rows, strict=True)]
             for rows in zip(before, after, strict=True)]  # fmt: skip
    assert max(max(row) for row in there) > 1e-2
    assert_rows_close(rows_of(found.kl(current), rollout.response_mask), there, 1e-10)
    if lora is None:
        assert not torch.equal(found.head.weight, current.head.weight)


@KINDS
def test_the_old_distribution_asks_for_no_gradient(base: str, lora: LoraSettings | None) -> None:
    """Checklist 42, 60. KL(old || new) reaches the policy through its second side alone, and no other role."""
    roles, old, _ = moved_roles(base, lora)
    rollout = ragged_rollout()
    found = roles.old_distribution(rollout, TEMPERATURE, old)
    assert not found.hidden.requires_grad
    found.kl(roles.distribution(rollout, TEMPERATURE)).sum().backward()
    mine = set(roles.policy_parameters())
    assert any(p.grad is not None and p.grad.any() for p in mine)
    assert all(p.grad is None or not p.grad.any() for p in roles.parameters() if p not in mine)


@KINDS
def test_an_error_while_looking_back_leaves_the_policy_alone(
    base: str, lora: LoraSettings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checklist 60. A run that survives it must not go on from the old weights."""
    roles, old, _ = moved_roles(base, lora)
    now = snapshot(roles.policy_parameters())

    def fail(*arguments: Any) -> None:
        assert same_bits(old, roles.policy_parameters())
        raise ZeroDivisionError

    monkeypatch.setattr(roles, "distribution", fail)
    with pytest.raises(ZeroDivisionError):
        roles.old_distribution(ragged_rollout(), TEMPERATURE, old)
    assert same_bits(now, roles.policy_parameters())


def peak_of_an_update(vocabulary: int, entropy_trains: bool) -> int:
    """Bytes of tensors that live at once in the logprobs of 1024 tokens, forward and backward, without the weights."""
    draws = torch.Generator().manual_seed(0)
    head = nn.Linear(8, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(1024, 8, generator=draws, requires_grad=True)
    ids = torch.randint(0, vocabulary, (1024,), generator=draws)
    tokens = TokenDistribution(hidden, head, ids, torch.ones(8, 128, dtype=torch.bool), 1.0)

    def update() -> None:
        logprobs, entropy = tokens.logprobs_and_entropy(entropy_trains)
        (logprobs.sum() + entropy.sum() if entropy_trains else logprobs.sum()).backward()

    return peak_of(update)


@pytest.mark.parametrize("entropy_trains", [False, True])
def test_memory_does_not_grow_with_the_vocabulary(entropy_trains: bool) -> None:
    """From 32k to 256k words less than 5 %, where the logits alone would take 128 MiB and 1 GiB."""
    small, large = (peak_of_an_update(size, entropy_trains) for size in (2**15, 2**18))
    assert abs(large - small) < 0.05 * small
    assert small < 2 * 4 * 1024 * 2**15
