"""Write the matrix of architectures in docs/models.md: `python -m tests.matrix`, or of some: `... qwen3 mamba`.

With names it prints their rows only.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from rich.progress import track

from tests.matrix.architectures import ARCHITECTURES
from tests.matrix.page import MARK, Served, matrix, measure

PAGE = Path(__file__).parents[2] / "docs/models.md"


def main() -> None:
    """Entry of the command line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: dict[str, Served | str] = {}
    for name in track(sys.argv[1:] or sorted(ARCHITECTURES), "architectures", disable=not sys.stderr.isatty()):
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(name, Path(folder))
    if sys.argv[1:]:
        print(matrix(rows).partition("served:\n")[2])
    else:
        PAGE.write_text(PAGE.read_text(encoding="utf-8").partition(MARK)[0] + matrix(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
