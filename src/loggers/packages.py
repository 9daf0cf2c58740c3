"""Packages that a logger needs and the project does not install by itself."""

from __future__ import annotations

from importlib.util import find_spec


def needs(package: str) -> None:
    """Raise `ImportError` with the command that installs `package`, if it is not there."""
    if find_spec(package) is None:
        raise ImportError(f"the package {package} is not installed: pip install -e '.[{package}]'")
