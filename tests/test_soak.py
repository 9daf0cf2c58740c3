"""A long run takes no more of the machine at its end than at its beginning; `python -m benchmarks.soak` runs longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import soak
from tests.tiny import FOREIGN_WARNINGS, write_lm

pytestmark = FOREIGN_WARNINGS


@pytest.mark.slow
def test_a_hundred_iterations_grow_nothing(tmp_path: Path) -> None:
    taken = soak(write_lm(tmp_path / "base"), tmp_path / "run", 100)
    memory = taken.fifths(taken.memory)
    assert memory[4] <= 1.02 * memory[2]  # the allocator's own growth ends before
    assert max(taken.files[80:]) <= max(taken.files[20:40])
    assert max(taken.threads[80:]) <= max(taken.threads[20:40])
