"""Kill PPO runs in every phase and at random times, resume them, and compare with an uninterrupted run.

    python -m benchmarks.kills --kills 20

Writes benchmarks/results/kills.md: one row per kill.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from tests.kills import PPO, Fault, Runner, differences, faults_of_ppo

RESULTS = Path(__file__).parent / "results"
HEAD = """\
A tiny PPO run (6 iterations, a checkpoint every second one) is killed with SIGKILL and resumed by the same command.
Compared bit for bit with an uninterrupted run: model and adapter, the checkpoints with both optimizers, metrics.csv,
samples, and result.json except its seconds.

| phase | time | equal? |
|---|---|---|
"""


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="each phase once, the rest at random times")
    parser.add_argument("--seed", type=int, default=1, help="seed of the calls and times")
    arguments = parser.parse_args()
    draw, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        runner.whole("first", PPO)  # trains the models that all runs share
        whole = runner.whole("whole", PPO)
        moments: list[Fault | float] = list(faults_of_ppo(draw)[: arguments.kills])
        while len(moments) < arguments.kills:
            moments.append(draw.uniform(0.1, 0.9) * runner.seconds["whole"])
        for number, moment in enumerate(moments):
            found = differences(whole, runner.killed(f"kill-{number}", PPO, moment))
            phase, when = (
                (moment.phase, f"call {moment.call} of `{moment.target.split(':')[1]}`")
                if isinstance(moment, Fault)
                else ("any", f"after {moment:.2f} s of {runner.seconds['whole']:.2f}")
            )
            rows.append(f"| {phase} | {when} | {'yes' if not found else 'no: ' + '; '.join(found[:3])} |")
            print(rows[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kills.md").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
