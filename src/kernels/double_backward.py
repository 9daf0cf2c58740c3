"""Whether gradients will be differentiated again, as trust regions need: then only plain ways may be gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch.nn.attention import SDPBackend, sdpa_kernel

_asked_for = ContextVar("twice_differentiable", default=False)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within it nothing takes a way whose gradient is worked out by hand; of PyTorch's attentions the plain one."""
    before = _asked_for.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _asked_for.reset(before)


def is_twice_differentiable() -> bool:
    """Whether one is within it."""
    return _asked_for.get()
