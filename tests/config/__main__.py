"""Write docs/options.md: `python -m tests.config`."""

from tests.config.page import PAGE, page

PAGE.write_text(page(), encoding="utf-8")
