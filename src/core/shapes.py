"""Shapes and dtypes by name. The tests check every call of `src.core` against them (jaxtyping); a run does not.

Letters: B sequences, T response tokens, V words of the vocabulary, K stop tokens, N any number, *N any shape. `Float`
is any floating-point dtype, `Int` any whole number. A mask is True where an element counts.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]
Ids = Int[Tensor, "B T"]

PerSequence = Float[Tensor, "B"]
Flags = Bool[Tensor, "B"]
Indices = Int[Tensor, "B"]

Scalar = Float[Tensor, ""]
Row = Float[Tensor, "N"]
PerBin = Float[Tensor, "bins"]
StopIds = Int[Tensor, "K"]

PerWord = Float[Tensor, "*N V"]
AnyFloat = Float[Tensor, "*N"]
AnyIds = Int[Tensor, "*N"]
AnyMask = Bool[Tensor, "*N"]
Anything = Shaped[Tensor, "*N"]  # any dtype
