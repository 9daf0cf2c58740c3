"""Every mask of six tokens, with rewards and values to go with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

LENGTH = 6


@pytest.fixture
def mask() -> Tensor:
    """All 64 masks of six tokens, one below the other: full, empty, ragged and with gaps."""
    return torch.cartesian_prod(*[torch.tensor([False, True])] * LENGTH)


@pytest.fixture
def rewards(mask: Tensor) -> Tensor:
    return torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def values(mask: Tensor) -> Tensor:
    return torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
