"""One page about a run, or several runs next to each other.

  python -m src.report RUN             the page of a run or a pipeline
  python -m src.report RUN RUN ...     a comparison

Writes RUN/report.html, or comparison.html into the folder that the runs have
in common, or --out FILE. The page needs no network. A run that is unfinished,
failed or was copied in part gives a page of what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from src.report.compare import write_comparison
from src.report.page import write_page
from src.utils.exits import friendly_errors
from src.utils.terminal import say


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or of a pipeline")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write")
    given = parser.parse_args()
    with friendly_errors():
        several = len(given.runs) > 1
        say(str(write_comparison(given.runs, given.out) if several else write_page(given.runs[0], given.out)))


if __name__ == "__main__":
    main()
