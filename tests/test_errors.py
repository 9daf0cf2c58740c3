"""Settings out of range are refused in words that name them."""

from __future__ import annotations

import pytest

from src.errors import SettingError, require


def test_require_lets_the_good_pass() -> None:
    require(True, "lam", 0.5, "between 0 and 1")


@pytest.mark.parametrize("value", [1.5, "high", None])
def test_the_error_names_setting_value_and_range(value: object) -> None:
    with pytest.raises(SettingError) as error:
        require(False, "lam", value, "between 0 and 1")
    assert isinstance(error.value, ValueError)
    assert (error.value.name, error.value.value, error.value.allowed) == ("lam", value, "between 0 and 1")
    for part in ("lam", repr(value), "between 0 and 1"):
        assert part in str(error.value)
