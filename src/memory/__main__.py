"""Estimate the memory of a PPO run before anything is loaded.

python -m src.memory                                     the embedded default
python -m src.memory model=gpt2 ppo.micro_batch_size=8   another model, another size
python -m src.memory model.lora=null                     every weight trained

Each row is the largest memory of a role or phase; weights and Adam's states stay, phases follow one another. Of a model
only config.json is read; weights are not needed.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from src.config.compose import compose
from src.config.schema import PPORun
from src.errors import ConfigError
from src.utils.exits import friendly_errors


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value or group=option, as for python -m src.train")
    overrides = parser.parse_args().overrides
    with friendly_errors(overrides):
        run = compose(overrides)
        if not isinstance(run, PPORun):
            raise ConfigError(f"stage={run.stage}: memory is estimated for stage=ppo; leave stage out")
        from src.memory.report import estimate_of, memory_table  # loads torch and transformers
        from src.stages.checks import check_ppo
        from src.utils.output import set_up_output

        set_up_output()

        check_ppo(run)
        Console().print(memory_table(estimate_of(run)))


if __name__ == "__main__":
    main()
