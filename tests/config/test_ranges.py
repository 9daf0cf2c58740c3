"""The ranges of the schema are those of the objects: what one refuses, the other does."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from src.checkpointing.checkpoint import IterationCheckpoint
from src.checkpointing.graceful_stop import GracefulStop
from src.config import schema
from src.config.files import CONF, leaves, read
from src.config.schema import OPTIONS, Node, Typed
from src.errors import ConfigError, SettingError
from src.models.settings import LoraSettings, ModelSettings
from src.modules.settings import PPOSettings
from src.rollout.sampling import Sampler
from src.stages.objects import instantiate
from src.utils.nonfinite import FiniteGuard
from tests.config.composed import kinds_in, with_option

NUMBERS = (-1, -0.5, 0, 0.1, 0.5, 0.9, 1, 1.5, 2, 4, 5, 8, 9, 11, 12, 100)
WORDS = ("max", "min", "mean", "float32", "bfloat16", "float16", "float64", "float8", "int8")
WIDER = {  # each bounds another one, which the object alone can see
    *("ppo.dual_clip", "ppo.clip_high"),
    *("reward.lowest", "reward.highest", "gold_reward.lowest", "gold_reward.highest"),
}


def numbers(annotation: Any) -> tuple[Any, ...]:
    """What to try for a number or a word; nothing for a field of another type."""
    inside = {annotation, *get_args(annotation)}
    return WORDS if get_origin(annotation) is Literal else NUMBERS if inside & {int, float} else ()


def taken_by_schema(kind: type[Node], name: str) -> set[Any]:
    """The values that the schema accepts."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind.model_fields[name].rebuild_annotation(), config={"strict": True})

    def accepts(value: Any) -> bool:
        try:
            adapter.validate_python(value)
        except ValidationError:
            return False
        return True

    return {value for value in numbers(kind.model_fields[name].annotation) if accepts(value)}


def taken_by_object(make: Callable[[Any], Any], candidates: tuple[Any, ...]) -> set[Any]:
    """The values with which an object can be made."""

    def accepts(value: Any) -> bool:
        try:
            make(value)
        except (ConfigError, SettingError):
            return False
        return True

    return {value for value in candidates if accepts(value)}


def from_node(node: dict[str, Any], argument: str) -> Callable[[Any], Any]:
    path = {"path": "somewhere"} if node.get("path", "") is None else {}  # of a model that is not there yet
    return lambda value: instantiate(node | path | {argument: value}, "x")


def of_nodes() -> Iterator[tuple[str, type[Node], str, Callable[[Any], Any]]]:
    """Key, declaration and maker of what an option hands to its object, in the node or by `${PLACE.KEY}`."""
    for group, (place, kinds) in OPTIONS.items():
        for name, kind in kinds.items() if place in ("ppo", "rollout", "reward", "gold_reward", "data") else ():
            plain = with_option("ppo", f"{group}={name}").plain()[place]
            if (place == "data" and name not in ("reviews", "arithmetic")) or name == "adapter":
                continue  # they read files at once
            raw = read(CONF / group / f"{name}.yaml")
            for key, value in leaves(raw.get(place, raw)):
                found = re.fullmatch(rf"\$\{{{place}\.(\w+)\}}", str(value))
                part, _, argument = key.partition(".")
                if found and argument and found[1] in kind.model_fields:
                    yield f"{place}.{found[1]}", kind, found[1], from_node(plain[part], argument)
            typed = {"": (kind, plain)} if issubclass(kind, Typed) else {}
            for part, field in kind.model_fields.items():
                typed |= {
                    f".{part}": (own, plain[part]) for own in kinds_in(field.annotation) if issubclass(own, Typed)
                }
            for part, (own, node) in typed.items():
                yield from ((f"{place}{part}.{n}", own, n, from_node(node, n)) for n in own.model_fields if n in node)


def of_python() -> Iterator[tuple[str, type[Node], str, Callable[[Any], Any]]]:
    """The same of the objects that a builder makes."""
    makers: list[tuple[str, type[Node], Callable[..., Any]]] = [
        ("ppo", schema.PPO, partial(PPOSettings, batch_size=100, minibatch_size=1)),
        ("ppo", schema.Critic, partial(PPOSettings, batch_size=100, minibatch_size=1)),
        ("rollout", schema.Rollout, partial(Sampler, max_new_tokens=1, temperature=1.0)),
        ("model.lora", schema.Lora, LoraSettings),
        ("model", schema.Model, partial(ModelSettings, path="somewhere")),
        ("callbacks.checkpoint", schema.Checkpoint, partial(IterationCheckpoint, "f", 1, 1, None, "max")),
        ("callbacks.stop", schema.Stop, GracefulStop),
        ("nonfinite", schema.Nonfinite, partial(FiniteGuard, folder="f")),
    ]
    for place, kind, make in makers:
        known = inspect.signature(make).parameters
        for name in kind.model_fields:
            if name in known and name != "batch_size":  # which bounds minibatch_size
                yield f"{place}.{name}", kind, name, lambda value, make=make, name=name: make(**{name: value})


def test_ranges_are_those_of_the_objects() -> None:
    """Where an object checks a number by itself, it takes what the schema takes."""
    compared = set()
    for key, kind, name, make in [*of_nodes(), *of_python()]:
        candidates = numbers(kind.model_fields[name].annotation)
        by_schema = taken_by_schema(kind, name) if candidates else set()
        if float not in {kind.model_fields[name].annotation, *get_args(kind.model_fields[name].annotation)}:
            candidates = tuple(value for value in candidates if not isinstance(value, float))
        by_object = taken_by_object(make, candidates)
        if by_object != set(candidates):  # it checks
            compared.add(key)
            assert by_object == by_schema or (key in WIDER and by_object < by_schema), key
    assert len(compared) > 50, sorted(compared)
