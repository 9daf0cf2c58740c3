"""Examine a run before time or money is spent on it.

python -m src.doctor                                     the embedded default
python -m src.doctor model.path=FOLDER reward=vader      as for python -m src.train

Composes and checks the configuration as training does, loads the models, answers a few prompts and learns from them
once, without writing anything. Every row is one check: ok, a warning, or a fault with what mends it. The exit code is 1
if there is a fault. docs/doctor.md says what each check can promise.
"""

from __future__ import annotations

import argparse
import logging

from rich.console import Console

from src.utils.exits import friendly_errors, leave


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value or group=option, as for python -m src.train")
    overrides = parser.parse_args().overrides
    with friendly_errors(overrides):
        from src.doctor.diagnose import diagnose  # loads torch and transformers
        from src.doctor.table import table_of
        from src.utils.output import set_up_output

        set_up_output()
        logging.getLogger("src").setLevel(logging.WARNING)  # what is trained first is not trained here
        found = []
        with Console(stderr=True).status("configuration") as status:
            for check in diagnose(overrides):
                found.append(check)
                status.update(f"{len(found)} checks, {check.name} is done")
        Console().print(table_of(found))
        if any(check.level == "fault" for check in found):
            leave(1)


if __name__ == "__main__":
    main()
