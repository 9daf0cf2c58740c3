"""A copy of conf/ that a test may change."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.config.files import CONF, brings


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the copy, which is composed from; see that nothing composed from it is cached."""
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    for module in ("files", "compose"):
        monkeypatch.setattr(f"src.config.{module}.CONF", conf)
    brings.cache_clear()
    yield conf
    brings.cache_clear()
