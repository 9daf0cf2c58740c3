"""Train a very small model for many iterations and record memory, open files and threads.

    python -m benchmarks.soak --iterations 500

Writes benchmarks/results/soak.md: means over each fifth of the run.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

from src.utils.output import set_up_output
from tests.soak import soak
from tests.tiny import write_lm

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=500, help="a multiple of 5")
    iterations = parser.parse_args().iterations
    set_up_output()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        found = soak(write_lm(Path(folder, "base")), Path(folder, "run"), iterations)
    rows = zip(*(found.fifths(numbers) for numbers in (found.memory, found.files, found.threads)), strict=True)
    size = iterations // 5
    lines = [
        f"{iterations} PPO iterations of a two-layer model of width 16, with tables, samples and a checkpoint in each.",
        "",
        "| iterations | memory (MiB) | open files | threads |",
        "|---|---|---|---|",
        *(
            f"| {i * size + 1} to {(i + 1) * size} | {memory:.1f} | {files:.1f} | {threads:.1f} |"
            for i, (memory, files, threads) in enumerate(rows)
        ),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
