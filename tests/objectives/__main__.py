"""Write docs/objectives.md: `python -m tests.objectives`."""

from pathlib import Path

from tests.objectives.page import page

if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs/objectives.md").write_text(page(), encoding="utf-8")
