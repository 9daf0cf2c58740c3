"""Every loss by every aggregation: how a minibatch is cut, padded and ordered changes neither value nor gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.core.aggregation import constant_length, sequence_mean, token_mean, weighted_sum
from src.core.kl import categorical_kl, k1, k2, k3
from src.core.logprobs import entropy_from_logits, logprobs_from_logits, normalized_logits
from src.core.policy_losses import (
    ClippedSurrogate,
    ClippedWeight,
    DualClippedSurrogate,
    Reinforce,
    SequenceClippedSurrogate,
    Surrogate,
)
from src.core.value_losses import ClippedSquaredError, SquaredError

LENGTHS = [7, 2, 1, 5, 0, 3]  # one row in which nothing counts
ORDER = [3, 5, 0, 4, 1, 2]
VOCABULARY, HIDDEN = 6, 4

Batch = dict[str, Tensor]
Term = Callable[["Model", Batch], Tensor]
Cut = Callable[[Batch], list[Batch]]


class Model:
    """A causal policy with a critic: what it thinks at a token depends on the mean of all tokens before."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator)
        self.head = torch.randn(HIDDEN, VOCABULARY, dtype=torch.float64, generator=generator)
        self.critic = torch.randn(HIDDEN, dtype=torch.float64, generator=generator)
        self.parameters = [x.requires_grad_() for x in (self.embedding, self.head, self.critic)]

    def hidden(self, batch: Batch) -> Tensor:
        places = torch.arange(1, batch["states"].shape[1] + 1).unsqueeze(1)
        return (self.embedding[batch["states"]].cumsum(1) / places).tanh()

    def logits(self, batch: Batch) -> Tensor:
        return self.hidden(batch) @ self.head

    def logprobs(self, batch: Batch) -> Tensor:
        return logprobs_from_logits(self.logits(batch), batch["actions"], 0.8)

    def values(self, batch: Batch) -> Tensor:
        return self.hidden(batch) @ self.critic


def policy_term(loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Term:
    return lambda m, b: loss(m.logprobs(b), b["old_logprobs"], b["advantages"], b["mask"])[0]


def value_term(loss: Callable[..., tuple[Tensor, Tensor]]) -> Term:
    return lambda m, b: loss(m.values(b), b["old_values"], b["returns"], b["mask"])[0]


def exact_kl(model: Model, batch: Batch) -> Tensor:
    """To the uniform policy."""
    log_p = normalized_logits(model.logits(batch))
    return categorical_kl(log_p, torch.zeros_like(log_p).log_softmax(-1))


def penalized(model: Model, batch: Batch) -> Tensor:
    """PPO-penalty beside an entropy bonus: several terms in one, as in training."""
    kl = k3(batch["old_logprobs"], model.logprobs(batch))
    return TERMS["surrogate"](model, batch) + 0.3 * kl - 0.1 * TERMS["entropy"](model, batch)


TERMS: dict[str, Term] = {
    "reinforce": policy_term(Reinforce()),
    "surrogate": policy_term(Surrogate()),
    "clip": policy_term(ClippedSurrogate(0.2, 0.3)),
    "dual_clip": policy_term(DualClippedSurrogate(0.2, 0.3, 1.5)),
    "gspo": policy_term(SequenceClippedSurrogate(0.1, 0.1)),
    "cispo": policy_term(ClippedWeight(0.3, 0.2)),
    "penalty": penalized,
    "mse": value_term(SquaredError()),
    "clipped_mse": value_term(ClippedSquaredError(0.2)),
    "entropy": lambda m, b: entropy_from_logits(m.logits(b), 0.8),
    "k1": lambda m, b: k1(m.logprobs(b), b["old_logprobs"]),
    "k2": lambda m, b: k2(m.logprobs(b), b["old_logprobs"]),
    "k3": lambda m, b: k3(m.logprobs(b), b["old_logprobs"]),
    "exact_kl": exact_kl,
}
AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant_length": partial(constant_length, length=9),
}


def as_it_is(batch: Batch) -> list[Batch]:
    return [batch]


def padded(batch: Batch) -> list[Batch]:
    """Three more columns of tokens that were never sampled, with numbers that would be noticed."""

    def longer(name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 3), value={torch.bool: 0, torch.int64: 1}.get(x.dtype, 66.0))

    return [{name: longer(name, x) for name, x in batch.items()}]


def reordered(batch: Batch) -> list[Batch]:
    return [{name: x[ORDER] for name, x in batch.items()}]


def cut(batch: Batch, size: int) -> list[Batch]:
    """`size` rows at a time, each piece trimmed to its longest response (at least one token wide)."""
    pieces = []
    for start in range(0, len(LENGTHS), size):
        rows = {name: x[start : start + size] for name, x in batch.items()}
        width = max(1, int(rows["mask"].sum(1).max()))
        pieces.append({name: x[:, :width] for name, x in rows.items()})
    return pieces


CUTS: dict[str, Cut] = {
    "one row at a time": partial(cut, size=1),
    "two rows at a time": partial(cut, size=2),
    "five and one": partial(cut, size=5),
    "padded": padded,
    "reordered": reordered,
    "reordered, padded, cut": lambda b: [piece for whole in reordered(padded(b)[0]) for piece in cut(whole, 4)],
}


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def batch(model: Model) -> Batch:
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    names = ("old_values", "returns", "advantages", "drift")
    batch = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name in names}
    batch["mask"] = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    for name in ("states", "actions"):
        batch[name] = torch.randint(0, VOCABULARY, shape, generator=generator)
    batch["old_logprobs"] = model.logprobs(batch).detach() + 0.4 * batch.pop("drift")
    return batch


def value_and_gradient(model: Model, term: Term, pieces: list[Batch]) -> tuple[Tensor, Tensor]:
    """Each piece backward by itself, as in training; the gradient of all parameters as one vector."""
    total, gradient = torch.zeros((), dtype=torch.float64), torch.zeros(0)
    for piece in pieces:
        loss = weighted_sum(term(model, piece), piece["weights"], piece["mask"])
        parts = torch.autograd.grad(loss, model.parameters, allow_unused=True, materialize_grads=True)
        vector = torch.cat([part.flatten() for part in parts])
        gradient = gradient + vector if len(gradient) else vector
        total += loss.detach()
    return total, gradient


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", TERMS)
def test_neither_value_nor_gradient_changes(name: str, aggregation: str, how: str, model: Model, batch: Batch) -> None:
    """Checklist 47, 11 and 12. The weights are those of the whole minibatch, whatever becomes of it afterward."""
    batch["weights"] = AGGREGATIONS[aggregation](batch["mask"])
    whole = value_and_gradient(model, TERMS[name], as_it_is(batch))
    assert_close(value_and_gradient(model, TERMS[name], CUTS[how](batch)), whole)
    assert whole[1].abs().max() > 1e-3  # the comparison is about something


@pytest.mark.parametrize("how", ["padded", "reordered"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_weights_do_not_change_either(aggregation: str, how: str, batch: Batch) -> None:
    """Checklist 11 and 47. Computed after padding or shuffling they are those computed before."""
    aggregate = AGGREGATIONS[aggregation]
    (afterward,) = CUTS[how](batch)
    (before,) = CUTS[how](batch | {"weights": aggregate(batch["mask"])})
    assert_close(aggregate(afterward["mask"])[before["mask"]], before["weights"][before["mask"]])
    assert aggregate(afterward["mask"])[~before["mask"]].eq(0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", TERMS)
def test_weights_of_each_micro_batch_would_be_noticed(name: str, aggregation: str, model: Model, batch: Batch) -> None:
    """Checklist 47. The mistake itself, a mean over pieces of different size, so the test above can fail."""
    whole = value_and_gradient(model, TERMS[name], [batch | {"weights": AGGREGATIONS[aggregation](batch["mask"])}])
    pieces = cut(batch, 4)
    for piece in pieces:
        piece["weights"] = AGGREGATIONS[aggregation](piece["mask"]) / len(pieces)
    assert not torch.allclose(value_and_gradient(model, TERMS[name], pieces)[1], whole[1], rtol=1e-2)


def test_the_batch_meets_every_bound(model: Model, batch: Batch) -> None:
    """Checklist 43, 44 and 45. Clipped and unclipped tokens both, so that no loss above is another in disguise."""
    arguments = (model.logprobs(batch), batch["old_logprobs"], batch["advantages"], batch["mask"])
    bounded = [ClippedSurrogate(0.2, 0.3), DualClippedSurrogate(0.2, 0.3, 1.5), SequenceClippedSurrogate(0.1, 0.1)]
    shares = [
        x[batch["mask"]].mean() for loss in [*bounded, ClippedWeight(0.3, 0.2)] for x in loss(*arguments)[1].values()
    ]
    clipped = ClippedSquaredError(0.2)(model.values(batch), batch["old_values"], batch["returns"], batch["mask"])[1]
    shares.append(clipped[batch["mask"]].mean())
    assert len(shares) == 6
    assert all(0 < share < 1 for share in shares)
