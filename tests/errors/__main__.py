"""Write docs/errors.md: `python -m tests.errors`."""

from tests.errors.page import PAGE, page
from tests.errors.table import GROUPS

PAGE.write_text(page(), encoding="utf-8")
print(f"{PAGE}: {sum(map(len, GROUPS.values()))} rows")
