"""Whether gradients will be differentiated again, as trust regions need; fast kernels cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch.nn.attention import SDPBackend, sdpa_kernel

_asked_for = ContextVar("twice_differentiable", default=False)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Use only operators that can be differentiated twice: no hand-written gradients, PyTorch's plain attention."""
    before = _asked_for.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _asked_for.reset(before)


def is_twice_differentiable() -> bool:
    """Whether `twice_differentiable` is active."""
    return _asked_for.get()
