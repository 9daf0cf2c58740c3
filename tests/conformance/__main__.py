"""Write docs/conformance.md: `python -m tests.conformance`."""

from pathlib import Path

from tests.conformance.page import page

if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs/conformance.md").write_text(page(), encoding="utf-8")
