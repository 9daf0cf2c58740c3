"""What a command shows: this project's news, once, on the standard output of the moment."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import pytest
import transformers

from src.utils.output import set_up_output


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """Everything that is set for the whole process is set back."""
    names = ("src", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    levels, handlers = {name: logging.getLogger(name).level for name in names}, logging.getLogger("src").handlers[:]
    verbosity = transformers.utils.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    logging.getLogger("src").handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


def test_news_are_shown_once_wherever_standard_output_leads_now(
    as_it_was: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when it is set up twice, as by a pipeline whose stages set it up too; warnings and errors as well."""
    set_up_output()
    set_up_output()
    log = logging.getLogger("src.somewhere.deep")
    log.info("the first")
    log.debug("of no interest")
    log.warning("the second")
    assert capsys.readouterr().out == "the first\nthe second\n"
    with contextlib.redirect_stdout(io.StringIO()) as elsewhere:
        log.info("the third")
    assert (elsewhere.getvalue(), capsys.readouterr().out) == ("the third\n", "")


def test_libraries_are_quiet_and_their_errors_are_not(as_it_was: None) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        set_up_output()
        for module in ("lightning.pytorch.trainer", "peft.tuners", "src.modules.ppo"):
            warnings.warn_explicit(f"from {module}", UserWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in seen] == ["from src.modules.ppo"]
    for name in ("lightning.pytorch", "lightning.fabric.utilities"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)
    assert transformers.utils.logging.get_verbosity() == logging.ERROR
