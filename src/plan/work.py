"""What passes of a model do, counted from its shape: operations, bytes, numbers, calls. No time yet.

A forward pass of `layers` layers over N tokens with A pairs of a token and one it attends to (itself included), W
weights in a layer's linear maps and a = sum of rank (K + N) over its adapted ones:

    products   2 N (layers W + adapted a) + 2 V H R      R tokens read the vocabulary head
    attention  4 heads D A layers                        scores and weighted sums
    bytes      size (layers W + V H) per pass            weights; while decoding also cached keys and values
    elements   N sum(inputs + outputs of the linear maps) + 4 V R
    calls      linear maps and adapters' factors, 6 others per layer

Backward: the products once more for gradients of activations, once more for those of trained weights; attention,
elements and calls twice more. Only layers at or above the lowest adapted one are passed backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

OTHERS = 6  # calls of a layer that are no linear map: two norms, attention, activation, two sums
DRAWING = 8  # passes over the scores of all words to draw a token, the log-probability's included
READING = 4  # the same for a log-probability
Maps = Mapping[tuple[int, int], float]  # (inputs, outputs) of a linear map -> how many of them a layer has


@dataclass(frozen=True)
class Work:
    """Amounts of work by kind; they add up."""

    products: float = 0.0  # operations of matrix products, a multiplication and an addition are two
    attention: float = 0.0  # operations of attention
    bytes: float = 0.0  # of weights and cached keys and values that products read
    elements: float = 0.0  # numbers that norms, activations, sums and softmaxes read or write
    calls: float = 0.0  # of operators in passes over whole sequences
    steps: float = 0.0  # the same while decoding
    updates: float = 0.0  # numbers that an optimizer step changes
    sent: float = 0.0  # bytes that a rank sends to others

    def __add__(self, other: Work) -> Work:
        return Work(**{kind: getattr(self, kind) + getattr(other, kind) for kind in KINDS})

    def __mul__(self, times: float) -> Work:
        return Work(**{kind: times * getattr(self, kind) for kind in KINDS})


KINDS = tuple(field.name for field in fields(Work))


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder whose layers are alike."""

    layers: int
    width: int
    maps: Maps
    adapted: Maps  # those with adapters; empty where every weight is trained
    attention: int  # heads times their size
    cached: int  # heads of keys and values times their size
    vocabulary: int
    size: int  # bytes of a number
    rank: int = 0

    @property
    def of_layer(self) -> float:
        """Weights of a layer's linear maps."""
        return sum(count * k * n for (k, n), count in self.maps.items())

    @property
    def of_adapters(self) -> float:
        """Weights of a layer's adapters."""
        return self.rank * sum(count * (k + n) for (k, n), count in self.adapted.items())

    @property
    def of_head(self) -> int:
        """Weights of the vocabulary head, and of the embedding."""
        return self.vocabulary * self.width


@dataclass(frozen=True)
class Rows:
    """Sequences of one length that a pass reads."""

    count: float
    tokens: float
    scored: float = 0.0  # tokens of each whose hidden state the vocabulary head reads

    @property
    def pairs(self) -> float:
        """A token and one it attends to."""
        return self.count * self.tokens * (self.tokens + 1) / 2


def forward(shape: Shape, rows: Rows, layers: int, adapted: int = 0) -> Work:
    """A forward pass through `layers` layers, the top `adapted` of them with an adapter."""
    tokens, scored = rows.count * rows.tokens, rows.count * rows.scored
    weights = layers * shape.of_layer + adapted * shape.of_adapters
    touched = sum(count * (k + n) for (k, n), count in shape.maps.items())
    above = sum(count * n for (_, n), count in shape.adapted.items())
    return Work(
        products=2 * tokens * weights + 2 * scored * shape.of_head,
        attention=4 * shape.attention * rows.pairs * layers,
        bytes=shape.size * (weights + (shape.of_head if scored else 0)),
        elements=tokens * (layers * touched + adapted * above) + READING * scored * shape.vocabulary,
        calls=layers * (sum(shape.maps.values()) + OTHERS) + 2 * adapted * sum(shape.adapted.values()) + bool(scored),
    )


def learn(
    shape: Shape, rows: Rows, layers: int, adapted: int | None, entropy: bool = False, checkpointing: bool = False
) -> Work:
    """A forward and backward pass; `adapted` None: every weight is trained.

    With a frozen head its gradient is made in the forward pass, with one more product, or two with an entropy bonus;
    a trained head computes the scores again.
    """
    tokens, scored = rows.count * rows.tokens, rows.count * rows.scored
    body = Rows(rows.count, rows.tokens)
    back = layers if adapted is None else adapted
    again = forward(shape, body, back, adapted or 0)
    trained = again.products if adapted is None else 2 * tokens * back * shape.of_adapters
    head = (3 if adapted is None else 1 + entropy) * 2 * scored * shape.of_head
    more = Work(products=again.products + trained + head, bytes=2 * again.bytes, attention=2 * again.attention,
                elements=2 * again.elements, calls=2 * again.calls)  # fmt: skip
    return forward(shape, rows, layers, adapted or 0) + more + again * checkpointing


def decode(shape: Shape, rows: float, prompts: float, prompt: float, new: float, adapted: int) -> Work:
    """Responses of `new` tokens to prompts of `prompt` tokens, equal prompts read once, keys and values cached."""
    first = forward(shape, Rows(prompts, prompt, 1), shape.layers, adapted)
    step = forward(shape, Rows(rows, 1, 1), shape.layers, adapted)
    seen = (new - 1) * (prompt + new / 2)  # summed over steps: tokens before, and the new one itself
    cached = rows * seen * shape.layers
    steps = Work(
        products=step.products,
        bytes=step.bytes,
        elements=step.elements + DRAWING * rows * shape.vocabulary,
        steps=step.calls,
    ) * (new - 1)
    return first + steps + Work(attention=4 * shape.attention * cached, bytes=2 * shape.size * shape.cached * cached)
