"""The bands of an embedded experiment: what its curves are like with several seeds.

    python -m benchmarks.bands sentiment --seeds 1 2 3 4 5 6 7 8 9 10

Reads the pipelines that `python -m benchmarks.seeds EXPERIMENT` has finished under logs/pipeline, and runs those that
are missing. Writes src/report/bands/EXPERIMENT.json, which the report draws, and the logged numbers of each seed to
tests/report/recorded, over which the tests of bands and alarms go. Prints how often a healthy run would leave the band:
each seed against the band of the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.seeds import run
from src.loggers.csv import read_table
from src.report.alarms import READ
from src.report.bands import HOME, NAMES, Left, band_of_tables, left, write_band
from src.report.read import Table

RECORDED = Path(__file__).parents[1] / "tests" / "report" / "recorded"
COLUMNS = [name for name in dict.fromkeys((*READ, *NAMES)) if "/" in name]


def record(experiment: str, seed: int) -> Table:
    """The logged numbers of a seed that tests and bands read; a pipeline that has not ended is run."""
    folder = run(experiment, experiment, seed, [])
    short = RECORDED / f"{experiment}_seed_{seed}.csv"
    write_short(read_table(folder / "ppo" / "metrics.csv"), short)
    return read_table(short)  # as the tests read it


def write_short(rows: Table, path: Path) -> None:
    """Write the columns that are read, with four significant digits."""
    known = [name for name in COLUMNS if any(name in row for row in rows.values())]
    lines = [",".join(["step", *known])]
    lines += [
        ",".join([str(step), *(f"{row[n]:.4g}" if n in row else "" for n in known)]) for step, row in rows.items()
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def left_out(experiment: str, tables: dict[int, Table]) -> dict[int, list[Left]]:
    """Seed -> the curves that leave the band of the other seeds."""
    others = {seed: {s: table for s, table in tables.items() if s != seed} for seed in tables}
    return {seed: left(tables[seed], band_of_tables(experiment, rest)) for seed, rest in others.items()}


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    given = parser.parse_args()
    tables = {seed: record(given.experiment, seed) for seed in given.seeds}
    write_band(band_of_tables(given.experiment, tables), HOME / f"{given.experiment}.json")
    for seed, curves in left_out(given.experiment, tables).items():
        print(f"seed {seed} leaves the band of the others: {', '.join(one.name for one in curves) or 'nothing'}")


if __name__ == "__main__":
    main()
