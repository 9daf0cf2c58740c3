"""Every file under conf/ composes, is commented, makes its light objects, and passes the checks."""

from __future__ import annotations

import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import hydra
import pytest

from src.config.files import CONF, brings, commented_keys, groups, headline, leaves, options, sources
from src.config.schema import Run
from src.stages.builders import stage_of
from src.stages.objects import instantiate
from src.stages.reward import RewardStage
from tests import families
from tests.config.composed import (
    EXPERIMENTS,
    NEEDS,
    STAGES,
    composed,
    covering,
    every_option,
    stages_of,
    with_option,
)

FILES = sorted(CONF.rglob("*.yaml"))
EXTRAS = ("tensorboard", "trackio", "mlflow")  # loggers whose package may not be installed


def make_light_objects(run: Run, folder: Path) -> set[str]:
    """Make all that a run needs and that holds no weights; returns the keys of the objects."""
    stage = stage_of(run)
    if isinstance(stage, RewardStage):
        assert stage.net_choice is not None
    stage.callbacks(folder)
    made = set()
    nodes = {f"ppo.{name}": node for name, node in run.plain().get("ppo", {}).items()} | {"model": run.plain()["model"]}
    loggers = {name: node for name, node in run.plain()["logger"].items() if name not in EXTRAS or find_spec(name)}
    nodes |= {f"logger.{name}": node for name, node in loggers.items()}
    for key, node in nodes.items():
        if isinstance(node, dict) and "_target_" in node:
            assert instantiate(node, key) is not None
            made.add(key)
    return made


@pytest.mark.slow
def test_every_option_composes_and_makes_its_light_objects_in_the_stages_that_read_it(tmp_path: Path) -> None:
    for option in every_option():
        assert stages_of(option), option
        for stage in stages_of(option):
            group, _, name = option.partition("=")
            assert with_option(stage, option).choices[group] == name
    made = {key for stage in STAGES for run in covering(stage) for key in make_light_objects(run, tmp_path)}
    parts = ("advantage", "policy_loss", "old_kl", "aggregation", "score_scaling", "missing_eos", "value_loss")
    parts += ("kl_estimator", "kl_controller", "old_kl_controller", "trust_region", "early_stop")
    loggers = {f"logger.{name}" for name in EXTRAS if find_spec(name)}
    assert made == {"model", "logger.csv", "logger.wandb", *loggers, *(f"ppo.{part}" for part in parts)}


def test_every_data_set_takes_the_arguments_it_is_given() -> None:
    """They are not built here: most lie in files or on the hub."""
    for name in options("data"):
        node = with_option("ppo", f"data={name}").plain()["data"]
        for place in (node, node.get("columns") or {}, node.get("pairs") or {}):
            if place:
                target = hydra.utils.get_object(place["_target_"])
                arguments = {key: value for key, value in place.items() if not key.startswith("_")}
                inspect.signature(target).bind_partial(**arguments)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders that stand for the models of the hub: architecture and context of each, without its size."""
    folders = {family: tmp_path_factory.mktemp("hub") for family in families.CLASSES}
    for family, folder in folders.items():
        families.config_of(family, families.tokenizer_of(family)).save_pretrained(folder)
    return {family: str(folder) for family, folder in folders.items()}


@pytest.mark.slow
def test_every_experiment_passes_the_checks_in_every_stage(hub: dict[str, str]) -> None:
    for option in EXPERIMENTS:
        for stage in STAGES:
            given = [f"stage={stage}", option, *([NEEDS[option]] if option in NEEDS else [])]
            run = composed(*given)
            if run.choices["model"] in hub:
                path = hub[run.choices["model"]]
                run = run.model_copy(update={"model": run.model.model_copy(update={"path": path})})
            stage_of(run).check()


# --------------------------------------------------------------------------------------------------- comments


def uncommented(text: str) -> list[str]:
    """Keys with a plain value and no comment on their line or just above.

    Not asked of: `_target_` and the like, the arguments that follow another key (`${...}`, which has the comment),
    entries of a defaults list, dropout rates of a model from scratch.
    """
    lines, found = text.splitlines(), []
    defaults = False
    for number, line in enumerate(lines):
        match = re.match(r"^( *)([\w.]+):(.*)$", line)
        if not match:
            continue
        indent, key, rest = len(match[1]), match[2], match[3]
        defaults = key == "defaults" or (defaults and indent > 0)
        value, commented = rest.split("#")[0].strip(), "#" in rest or lines[number - 1].strip().startswith("#")
        within = any(re.match(rf" {{{indent}}}_target_:", other) for other in lines)
        follows = within and re.fullmatch(r"\$\{[^}]+\}", value)
        if value and not (commented or defaults or follows or key.startswith("_") or key.endswith("_pdrop")):
            found.append(key)
    return found


# what the headline of the file has said
NAMES = {"name", "path", "attn_implementation", "target", "stage"}


def test_every_key_has_a_comment_and_every_file_a_headline() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8").split("\nhydra:")[0]  # Hydra's keys are documented by Hydra
        assert headline(path), path
        if path.parent.name not in ("experiment", "preset"):  # they give values to keys that have a comment elsewhere
            assert set(uncommented(text)) <= NAMES, path


def test_the_comment_rule_can_fail() -> None:
    assert uncommented("# headline\n\na: 1\nb:\n  c: 2\n  d: 3  # why\n  e: ${a}\n") == ["a", "c", "e"]
    assert uncommented("b:\n  _target_: x\n  c: ${a}\n# why\nd: 1\n") == []
    assert uncommented("defaults:\n  - x: y\nb:\n  _target_: x\n  c: 2\n") == ["c"]


def test_comments_are_found_at_the_place_their_key_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "g").mkdir()
    path = tmp_path / "g" / "o.yaml"
    path.write_text("# @package ppo\na: 1  # one\nb:\n  c: x  # two\nd: 4\nhydra:\n  e: 5  # not ours\n")
    monkeypatch.setattr("src.config.files.CONF", tmp_path)
    assert list(commented_keys(path)) == [("ppo.a", "1", "one"), ("ppo.b.c", "x", "two")]
    path.write_text("a: 1  # one\nb:\n  _partial_: true  # Hydra's\n")
    assert list(commented_keys(path)) == [("g.a", "1", "one")]
    assert list(commented_keys(tmp_path / "none.yaml")) == []


def test_a_headline_ends_where_a_line_ends_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "o.yaml"
    path.write_text("# @package ppo\n# One, two\n# and three. Four.\n# Five.\na: 1\n")
    assert headline(path) == "One, two and three. Four."
    path.write_text("a: 1  # one.\n")
    assert headline(path) == ""


# ------------------------------------------------------------------------------------------- who brings and sets what


def test_what_brings_a_group_along() -> None:
    critics = ["baseline_value", "gae", "td"]
    assert brings() == {
        "value_loss": {"advantage": critics},
        "old_kl_controller": {"policy_loss": sorted(set(options("policy_loss")) - {"trpo"})},
        "kl_estimator": {"kl": ["both", "loss", "reward"]},
        "kl_controller": {"kl": ["both", "loss", "reward"]},
        "correction_level": {"correction": ["mask", "truncate"]},
    }
    assert set(brings()) < set(groups())


def test_no_experiment_or_preset_chooses_in_a_group_that_another_brings() -> None:
    """It could not be combined with an option that does not bring the group along."""
    for group in ("model", "experiment", "preset"):
        for name in options(group):
            for source in sources({group: name}, []):
                assert not source.groups & set(brings()), source


def test_sources_are_listed_from_the_weakest_to_the_strongest() -> None:
    choices = {"model": "tiny", "experiment": "quick", "preset": "trlx", "advantage": "rloo"}
    found = sources(choices, ["advantage=rloo", "ppo.lr=1", "+trainer.x=2"])
    assert [source.name for source in found] == ["model=base", "model=tiny", "experiment=quick", "preset=trlx",
                                                 "the command line"]  # fmt: skip
    assert found[-1].keys == {"advantage", "ppo.lr", "trainer.x"}
    assert found[-1].groups == {"advantage"}
    assert {"data", "model"} == found[2].groups
    assert "ppo.num_iterations" in found[2].keys
    assert found[3].groups >= {"advantage", "policy_loss", "kl"}


def test_leaves_are_what_has_no_keys() -> None:
    assert dict(leaves({"a": {"b": 1, "c": {}}, "d": [1], "e": None})) == {"a.b": 1, "a.c": {}, "d": [1], "e": None}
