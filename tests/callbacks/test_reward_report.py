"""The picture at the end of the reward stage."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes

from src.callbacks.reward_report import RewardReport


def test_it_draws_the_margins_and_the_reliability_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bins hold pairs: p = 0.525 (two of four right) and p = 0.982 (all of three)."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(Axes, "scatter", lambda self, x, y, **_: drawn.update(x=x, y=y))
    hist = Axes.hist
    monkeypatch.setattr(Axes, "hist", lambda self, x, **kw: (drawn.update(margins=x), hist(self, x, **kw))[1])
    margins = [torch.tensor([0.1, -0.1, 0.1, -0.1]), torch.tensor([4.0, 4.0, 4.0])]
    main, module = SimpleNamespace(is_global_zero=True), SimpleNamespace(margins=margins)
    RewardReport(str(tmp_path)).on_test_end(main, module)  # type: ignore[arg-type]
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert drawn["margins"].tolist() == pytest.approx([0.1, -0.1, 0.1, -0.1, 4, 4, 4])
    assert drawn["x"].tolist() == pytest.approx([1 / (1 + 2.718281828**-0.1), 1 / (1 + 2.718281828**-4)])
    assert drawn["y"].tolist() == pytest.approx([0.5, 1.0])
    numbers = json.loads((tmp_path / "margins.json").read_text())
    bins = [(round(row["p"], 3), row["right"], row["pairs"]) for row in numbers["bins"]]
    assert bins == [(0.525, 0.5, 4), (0.982, 1.0, 3)]
    assert (numbers["edges"][0], numbers["edges"][-1]) == pytest.approx((-0.1, 4.0))
    assert sum(numbers["pairs"]) == 7
    assert (numbers["pairs"][0], numbers["pairs"][-1]) == (2, 3)
