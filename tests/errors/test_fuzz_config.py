"""Whatever is given on the command line: a configuration that passes every check, or one sentence, before weights."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from src.checkpointing.resume import find_checkpoint
from src.config.compose import compose
from src.config.errors import explain
from src.config.validate import preflight
from src.config.value_types import leaves
from src.runs.folder import run_folder
from src.runs.report import MENDABLE
from tests.errors.test_fuzz_readers import FEW

BASES = {
    "ppo": ["experiment=quick"],
    "sft": ["experiment=quick", "stage=sft"],
    "reward": ["experiment=quick", "stage=reward"],
    "other": ["experiment=none", "data=custom", "data.path=x.jsonl", "reward=http", "reward.url=http://x", "kl=none"],
}
VALUES = st.one_of(
    st.sampled_from(
        ["null", "true", "''", "[]", "[1,2]", "[null]", "{}", "{a:1}", "???", "x", "'a/b'", "'../x'", "é🎬"]
    ),
    st.sampled_from(
        ["${nope}", "${seed}", "${model}", "'${'", "'a=b'", "{_target_:os.system}", "'%s'", "'\n'", "x" * 999]
    ),
    st.sampled_from(["nan", "inf", "-inf", "1e999", "1e-400", "-1", "0", "3.5", "9" * 30, "0x10", "1_000", "-0.0"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text("abcß🎬-_.:/\\'\"{}[]$,= ", max_size=6),
)


@functools.cache
def keys(base: str) -> list[str]:
    """Every key of a configuration, and the nodes above them."""
    found = {leaf for leaf in leaves(compose(BASES[base])) if leaf.split(".")[0] not in ("overrides", "choices")}
    return sorted(found | {leaf.rpartition(".")[0] for leaf in found} - {""})


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """A configuration with one key set to something."""
    base = draw(st.sampled_from(sorted(BASES)))
    key, sign = draw(st.sampled_from(keys(base))), draw(st.sampled_from(["", "", "", "+", "++"]))
    deleted = draw(st.integers(0, 19)) == 0
    return [*BASES[base], f"~{key}" if deleted else f"{sign}{key}={draw(VALUES)}"]


def passes_or_is_refused(given: list[str], folder: Path) -> None:
    """What a run does before it reads data or loads weights."""
    given = [f"log_dir={folder}/logs", *given]
    try:
        config = compose(given)
        config.run_dir = str(run_folder(Path(config.log_dir) / config.stage, config.name, given, config.resume))
        preflight(config)
        find_checkpoint(config)
    except MENDABLE as error:
        found = explain(error, given) if isinstance(error, HydraException | OmegaConfBaseException) else str(error)
    else:
        found = "passed"
    assert found
    assert "None:" not in found
    assert not (folder / "logs").exists()  # nothing was begun


# of libraries that are handed odd values
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]


@settings(max_examples=25, **FEW)  # type: ignore[arg-type]
@given(overrides())
def test_an_override_passes_or_is_one_sentence(tmp_path_factory: pytest.TempPathFactory, given: list[str]) -> None:
    passes_or_is_refused(given, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@settings(max_examples=100, **FEW)  # type: ignore[arg-type]
@given(overrides())
def test_many_overrides_pass_or_are_one_sentence(tmp_path_factory: pytest.TempPathFactory, given: list[str]) -> None:
    passes_or_is_refused(given, tmp_path_factory.getbasetemp())
