"""Whatever is given on the command line: a configuration that passes every check, or one sentence, before weights."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.checkpointing.resume import find_checkpoint
from src.config.compose import compose
from src.config.files import leaves
from src.runs.folder import run_folder
from src.runs.report import MENDABLE
from src.stages.builders import stage_of
from src.utils.exits import one_sentence
from tests.errors.test_fuzz_readers import FEW

BASES = {
    "ppo": ["experiment=quick"],
    "sft": ["experiment=quick", "stage=sft"],
    "reward": ["experiment=quick", "stage=reward"],
    "other": ["experiment=none", "data=custom", "data.path=x.jsonl", "reward=http", "reward.url=http://x", "kl=none"],
    "mix": ["experiment=quick", "reward=mix", "gold_reward=taste", "policy_loss=trpo", "ppo.epochs=1", "trainer=ddp"],
    "net": ["stage=reward", "reward_net=pretrained", "reward_model.net.path=x", "data=tldr", "logger=wandb"],
}
VALUES = st.one_of(
    st.sampled_from(
        ["null", "true", "''", "[]", "[1,2]", "[null]", "{}", "{a:1}", "???", "x", "'a/b'", "'../x'", "é🎬", "1,2"]
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
    """Every key of a configuration, the nodes above them, and its groups."""
    run = compose(BASES[base])
    found = {leaf for leaf, _ in leaves(run.plain()) if leaf.split(".")[0] not in ("overrides", "choices")}
    return sorted(found | {leaf.rpartition(".")[0] for leaf in found} - {""} | set(run.choices))


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
        run = compose(given)
        place = run_folder(Path(run.log_dir) / run.stage, run.name, run.overrides, run.resume)
        run = run.model_copy(update={"run_dir": str(place)})
        stage_of(run).check()
        find_checkpoint(run, {})
    except MENDABLE as error:
        found = one_sentence(error)
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
@settings(max_examples=400, **FEW)  # type: ignore[arg-type]
@given(overrides())
def test_many_overrides_pass_or_are_one_sentence(tmp_path_factory: pytest.TempPathFactory, given: list[str]) -> None:
    passes_or_is_refused(given, tmp_path_factory.getbasetemp())
