"""The schema declares what conf/ holds and nothing else, and code reads all of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from src.config import schema
from src.config.compose import compose
from src.config.errors import declared
from src.config.files import CONF, groups, options, read
from src.config.schema import OPTIONS, OWN, RUNS, Node, Run, Target, Typed, run_type
from src.errors import ConfigError
from src.stages.builders import stage_of
from src.stages.objects import instantiate
from tests.config.composed import NEEDS, ROOT, STAGES, composed, covering, kinds_in
from tests.tiny import FOREIGN_WARNINGS, write_lm

pytestmark = FOREIGN_WARNINGS
Field = tuple[str, str]  # the class that declares it, and its name

# ------------------------------------------------------------------------------------- schema and files, both ways


def owner(kind: type[Node], name: str) -> str:
    """The class that declares a field."""
    declaring = (c.__name__ for c in kind.__mro__ if name in inspect.get_annotations(c))
    return next(c for c in declaring if not c.startswith("Chosen_"))  # joined from the others


def every_class(start: list[type[Node]]) -> set[type[Node]]:
    """These models and all below them."""
    found, todo = set(), list(start)
    while todo:
        kind = todo.pop()
        if kind not in found:
            found.add(kind)
            todo += [inside for field in kind.model_fields.values() for inside in kinds_in(field.annotation)]
    return found


def every_field() -> set[Field]:
    """What the schema declares."""
    start = [*RUNS.values(), *(kind for _, kinds in OPTIONS.values() for kind in kinds.values())]
    return {(owner(kind, name), name) for kind in every_class(start) for name in kind.model_fields}


def given_fields(node: Any) -> Iterator[Field]:
    """The fields that a configuration gives a value."""
    if isinstance(node, Node):
        for name in node.model_fields_set & set(type(node).model_fields):
            yield owner(type(node), name), name
            yield from given_fields(getattr(node, name))
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from given_fields(value)


def test_every_field_has_a_key_in_conf() -> None:
    """The other way round, a key without a field, is refused by each composition: tests/config/test_conf.py."""
    seen = {field for stage in STAGES for run in covering(stage) for field in given_fields(run)}
    assert every_field() - seen == set()


def test_a_key_that_no_field_declares_is_refused(own_conf: Path) -> None:
    for group, name, key in [("advantage", "gae", "made_up"), ("trainer", "default", "made_up")]:
        path = own_conf / group / f"{name}.yaml"
        text = path.read_text()
        path.write_text(text + (f"  {key}: 1\n" if group == "advantage" else f"{key}: 1\n"))
        if group == "advantage":
            with pytest.raises(ConfigError, match=r"ppo\.made_up, set by its group: there is no key ppo\.made_up"):
                compose([])
        else:  # the Trainer's own arguments are open: of Lightning, which refuses them when it is made
            with pytest.raises(ConfigError, match=r"trainer\.made_up: Lightning's Trainer has no such argument"):
                stage_of(compose([])).check()
        path.write_text(text)


def test_each_option_declares_the_keys_of_its_file_and_no_others() -> None:
    for group, (node, kinds) in OPTIONS.items():
        if kinds:
            assert set(kinds) | {"none"} == set(options(group)) | {"none"}, group
        base = set().union(*(kind.model_fields[node].annotation.model_fields for kind in RUNS.values()
                             if node in kind.model_fields and kinds_in(kind.model_fields[node].annotation)
                             and isinstance(kind.model_fields[node].annotation, type)))  # fmt: skip
        for option, kind in kinds.items():
            if group in ("data", "reward", "gold_reward"):
                continue  # a whole object, compared above
            content = dict(read(CONF / group / f"{option}.yaml"))
            content.pop("defaults", None)
            keys = set(content.get(node, content))
            assert keys - base == set(kind.model_fields) - base, f"{group}={option}"
            assert set(kind.model_fields) - base == set(kind.model_fields), f"{group}={option} declares a base key"


def test_every_group_is_known_and_those_without_models_take_any_option() -> None:
    assert set(groups()) == {*OPTIONS, *OWN}
    assert set(OWN) >= {group for group, (_, kinds) in OPTIONS.items() if not kinds}


def test_an_option_without_a_model_is_refused_with_the_place_to_add_it(own_conf: Path) -> None:
    (own_conf / "advantage" / "mine.yaml").write_text((own_conf / "advantage" / "rloo.yaml").read_text())
    sentence = "advantage=mine: its keys are not declared; add it to OPTIONS in src/config/schema/options.py"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        compose(["advantage=mine"])


def test_an_option_of_the_users_own_takes_any_argument(own_conf: Path) -> None:
    text = "# Mine.\n_target_: src.rewards.rules.LengthReward\ntarget_words: 3\n"
    (own_conf / "reward" / "mine.yaml").write_text(text)
    run = compose(["reward=mine", "reward.target_words=5"])
    assert instantiate(run.plain()["reward"], "reward").target_words == 5


def test_the_joined_model_has_the_keys_of_the_chosen_options_alone() -> None:
    kind = run_type("ppo", composed("advantage=rloo", "policy_loss=clip", NEEDS["advantage=rloo"]).choices)
    assert {"clip", "clip_low", "clip_high"} <= set(kind.model_fields["ppo"].annotation.model_fields)
    assert not {"lam", "critic_lr", "value_loss"} & set(kind.model_fields["ppo"].annotation.model_fields)


# ------------------------------------------------------------------------------------------------------ readers


class Reads:
    """Records the fields that code asks a configuration for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: set[Field] = set()
        ask, dump = Node.__getattribute__, Node.model_dump

        def asked(node: Node, name: str) -> Any:
            if name in type(node).__dict__.get("__pydantic_fields__", ()):
                self.seen.add((owner(type(node), name), name))
            return ask(node, name)

        def dumped(node: Node, **options: Any) -> dict[str, Any]:
            if not isinstance(node, Run):  # as arguments, all of them
                self.seen |= {(owner(type(node), name), name) for name in type(node).model_fields}
            return dump(node, **options)

        patch.setattr(Node, "__getattribute__", asked)
        patch.setattr(Node, "model_dump", dumped)


def referred() -> set[str]:
    """The keys that another key follows."""
    return set(re.findall(r"\$\{([\w.]+)\}", "".join(p.read_text("utf-8") for p in CONF.rglob("*.yaml"))))


def places() -> set[tuple[str, Field]]:
    """Each key that the schema declares, with the field that declares it."""
    start = [("", run) for run in RUNS.values()]
    start += [(node, kind) for node, kinds in OPTIONS.values() for kind in kinds.values()]
    return {found for place, kind in start for found in _places(place, kind)}


def _places(place: str, kind: type[Node]) -> Iterator[tuple[str, Field]]:
    for name, declaration in kind.model_fields.items():
        key = f"{place}.{name}".lstrip(".")
        yield key, (owner(kind, name), name)
        for inside in kinds_in(declaration.annotation):
            yield from _places(key, inside)


def arguments() -> set[Field]:
    """The fields of `_target_` nodes: Hydra hands all of them to an object, which refuses what it does not know."""
    start = [*RUNS.values(), *(kind for _, kinds in OPTIONS.values() for kind in kinds.values())]
    typed = every_class([kind for kind in every_class(start) if issubclass(kind, Typed | Target)])
    return {(owner(kind, name), name) for kind in typed for name in kind.model_fields}


def top_level_names() -> set[str]:
    """What src/ asks the configuration itself for, as `run.seed`."""
    text = "".join(p.read_text("utf-8") for p in (ROOT / "src").rglob("*.py") if p.parent.name != "config")
    return set(re.findall(r"\b(?:run|config)\.(\w+)", text))


def unread(seen: set[Field]) -> set[str]:
    """The keys that no object, no other key and no code reads."""
    by_code = seen | arguments() | {(run.__name__, name) for run in (Run, *RUNS.values()) for name in top_level_names()}
    read_keys = {key for key, field in places() if field in by_code} | referred()
    return {key for key, _ in places()} - read_keys


TRACED = (
    "stage=sft",
    "stage=reward",
    "stage=ppo trainer=ddp callbacks.checkpoint.best_metric=ppo/score early_stop=gold ppo.held_out.every=1",
    "stage=ppo policy_loss=trpo ppo.epochs=1 kl_controller=adaptive correction=mask",
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> set[Field]:
    """What the stages read of their configuration while they make everything for a training."""
    lm, folder = write_lm(tmp_path_factory.mktemp("lm")), tmp_path_factory.mktemp("run")
    model = f"model=gpt2 model.path={lm} rollout.max_prompt_tokens=8 rollout.max_new_tokens=8 reward=vader"
    with pytest.MonkeyPatch.context() as patch:
        found = set()
        for overrides in TRACED:
            own = model.split() if "ppo" in overrides else []
            run = compose(["experiment=quick", *overrides.split(), *own, "data.n_reviews=240", "data.n_pairs=20"])
            with patch.context() as inner:
                reads = Reads(inner)
                stage = stage_of(run)
                stage.check()
                stage.build(stage.corpus(), folder)
                stage.trainer(stage.callbacks(folder), folder)
            found |= reads.seen
    return found


def test_every_field_is_read(seen: set[Field]) -> None:
    assert unread(seen) == set()


def test_the_reader_rule_can_fail(seen: set[Field], monkeypatch: pytest.MonkeyPatch) -> None:
    class MadeUp(schema.Critic):
        nobody_reads: int

    class Stage(schema.Rollout):
        temperature_of_nobody: float

    node, kinds = OPTIONS["value_loss"]
    monkeypatch.setitem(OPTIONS, "value_loss", (node, kinds | {"mse": MadeUp}))
    monkeypatch.setitem(RUNS, "made_up", type("MadeUpRun", (schema.PPORun,), {"__annotations__": {"rollout": Stage}}))
    assert unread(seen) == {"ppo.nobody_reads", "rollout.temperature_of_nobody"}
    assert "ppo.epochs" in unread(seen - {("PPO", "epochs")})


def test_every_declared_key_has_a_type_in_words() -> None:
    assert len(declared()) > 150
    assert declared()["ppo.dual_clip"][1] == ["policy_loss=dual_clip"]
    assert declared()["ppo.clip"][1] == ["policy_loss=clip", "policy_loss=dual_clip"]
    assert declared()["ppo.num_iterations"][1] == []
    assert declared()["data.path"][1][0] == "data=custom"
