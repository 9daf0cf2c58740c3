"""Plan a PPO run before money is spent: what fits on which devices, and how long an iteration takes.

python -m src.plan                                            the embedded default: memory by role and phase
python -m src.plan.measure                                    measure this machine, once; then seconds are there too
python -m src.plan model=gpt2 --devices 4 --memory 24         four devices of 24 GB
python -m src.plan experiment=hh_qwen --card H100 --devices 8 eight cards, by published figures

Everything without -- is given as to src.train. Of a model only config.json is read; weights are not needed. Seconds
are predictions; docs/plan.md has the formulas, what they leave out, and how far off they were.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from src.config.compose import compose
from src.config.schema import PPORun
from src.errors import ConfigError
from src.utils.exits import friendly_errors

if TYPE_CHECKING:
    from src.plan.machine import Machine


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value or group=option, as for python -m src.train")
    parser.add_argument("--devices", type=int, help="how many; default: those of the trainer")
    parser.add_argument("--memory", type=float, help="GB (10^9 bytes) of each; default: the card's")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--card", help="published figures of A100, H100 or H200 in place of a measurement")
    where.add_argument("--rates", type=Path, help="what src.plan.measure wrote; default: logs/machine.json if there")
    parser.add_argument("--link", type=float, help="GB/s that a rank sends to others; default: the card's")
    parser.add_argument("--prompt", type=float, help="mean tokens of a prompt; default: the longest allowed")
    parser.add_argument("--response", type=float, help="mean tokens of a response; default: the longest allowed")
    return parser.parse_intermixed_args()


def machine_of(given: argparse.Namespace) -> Machine | None:
    """The machine whose seconds are predicted; None if none is measured or named."""
    from src.plan.machine import MEASURED, Machine, card

    if given.card is None and given.rates is None and not MEASURED.exists():
        return None
    found = card(given.card) if given.card else Machine.load(given.rates or MEASURED)
    return found if given.link is None else found.linked(given.link)


def memory_of(name: str | None) -> float | None:
    """The memory of a card in GB (10^9 bytes); None without a card."""
    from src.plan.machine import CARDS

    return None if name is None else CARDS[name].memory / 1e9


def main() -> None:
    """Entry of the command line."""
    given = arguments()
    with friendly_errors(given.overrides):
        for name in ("devices", "memory", "link", "prompt", "response"):
            if getattr(given, name) is not None and getattr(given, name) <= 0:
                raise ConfigError(f"--{name} {getattr(given, name):g} must be greater than 0")
        run = compose(given.overrides)
        if not isinstance(run, PPORun):
            raise ConfigError(f"stage={run.stage}: a plan is made for stage=ppo; leave stage out")
        from src.plan.report import report  # loads torch and transformers
        from src.stages.checks import check_ppo
        from src.utils.output import set_up_output

        set_up_output()
        check_ppo(run)
        console = Console()
        machine = machine_of(given)
        memory = given.memory or memory_of(given.card)
        for part in report(run, machine, given.devices, memory, given.prompt, given.response):
            console.print(part)


if __name__ == "__main__":
    main()
