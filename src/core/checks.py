"""Range checks of settings, worded so that the configuration key can be named."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting is out of its range; carries the setting's name, its value and the allowed range in words."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} must be {allowed}, but is {value!r}")
        self.name, self.value, self.allowed = name, value, allowed


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise `SettingError` unless `ok`."""
    if not ok:
        raise SettingError(name, value, allowed)
