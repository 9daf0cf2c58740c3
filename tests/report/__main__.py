"""Write docs/metrics.md: `python -m tests.report`."""

from tests.report.page import PAGE, page

PAGE.write_text(page(), encoding="utf-8")
