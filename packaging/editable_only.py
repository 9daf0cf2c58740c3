"""setuptools for `pip install -e .`, and a refusal for everything else.

A wheel would hold a top-level package `src` without `conf/`: the configuration lies beside the code, in a clone.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
)

__all__ = ["build_editable", "build_wheel", "get_requires_for_build_editable", "prepare_metadata_for_build_editable"]
SENTENCE = "lightning-ppo is a repository that is cloned and installed with `pip install -e .`; no wheel is built of it"


def build_wheel(*_: Any, **__: Any) -> NoReturn:
    """Refuse `pip install .` and `python -m build`."""
    sys.exit(f"error: {SENTENCE}")


get_requires_for_build_wheel = prepare_metadata_for_build_wheel = build_sdist = build_wheel
