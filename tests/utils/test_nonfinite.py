"""How often a number that is not finite is left out, and what is written down of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from src.errors import NonFiniteError, SettingError
from src.utils.nonfinite import FiniteGuard, json_number


def test_only_so_many_in_a_row() -> None:
    guard, nan, fine = FiniteGuard(2, None), {"x": math.nan}, {"x": 0.0}
    with pytest.warns(UserWarning, match="step 1, policy: x is nan; it is skipped"):
        assert not guard.passes("policy", 1, nan, list)
    assert not guard.passes("policy", 1, {"x": math.inf}, list)
    assert guard.passes("policy", 2, fine, list)
    assert not guard.passes("policy", 2, nan, list)
    assert guard.passes("critic", 2, fine, list)  # another part: not in between
    again = FiniteGuard(2, None)
    again.load_state_dict(guard.state_dict())
    for one in (guard, again):
        assert not one.passes("policy", 3, nan, list)
        with pytest.raises(NonFiniteError, match="step 3, policy: x is nan"):
            one.passes("policy", 3, nan, list)
        assert one.skipped == 4
    with pytest.raises(SettingError, match="skip"):
        FiniteGuard(-1, None)


def test_the_samples_are_written_down_and_named_before_the_run_ends(tmp_path: Path) -> None:
    """They are asked for only when something is wrong; a step that is done again writes the same file."""
    guard = FiniteGuard(0, str(tmp_path / "nonfinite"))
    assert guard.passes("policy", 1, {"loss": 0.5}, lambda: pytest.fail("nothing is wrong"))
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"step 2, policy: grad is inf, loss is nan; .*000002-policy-0.jsonl"):
            guard.passes("policy", 2, {"loss": math.nan, "grad": math.inf}, lambda: [{"text": "a"}, {"text": "é"}])
    (file,) = (tmp_path / "nonfinite").iterdir()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["a", "é"]
    assert {row["what"] for row in rows} == {"step 2, policy: grad is inf, loss is nan"}


def test_json_holds_every_number() -> None:
    assert [json_number(x) for x in (0.5, math.nan, math.inf, -math.inf)] == [0.5, "nan", "inf", "-inf"]
