"""Compositions that several tests look at, each made once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, get_args

from src.config.compose import compose, readable_by
from src.config.files import brings, groups, options
from src.config.schema import OPTIONS, RUNS, Node, Run

STAGES = tuple(RUNS)
ROOT = Path(__file__).parents[2]
GROUPS = "rollout.samples_per_prompt=4"
# an option that needs a value which only the user knows -> what makes it whole
NEEDS = {
    "data=movie_reviews": "data.path=here",
    "data=custom": "data.path=here",
    "data=custom_texts": "data.path=here",
    "data=reasoning_gym": "data.task=chain_sum",
    "engine=vllm_server": "rollout.engine.urls=[http://localhost:1]",
    "experiment=movie_reviews": "data.path=here",
    "kl_estimator=exact": "kl=loss",
    "kl_estimator=k2": "kl=loss",
    "kl_estimator=k3": "kl=loss",
    "correction_level=sequence": "correction=mask",
    "correction_level=token": "correction=truncate",
    "reward=function": "reward.target=math.fsum",
    "reward=http": "reward.url=http://localhost:1",
    "reward=judge": "reward.model=wise",
    "reward=judge_pairs": "reward.model=wise",
    "gold_reward=judge": "gold_reward.model=wise",
    "reward=keyword": "reward.keywords=[good]",
    "reward=regex": "reward.pattern=good",
    "reward_net=pretrained": "reward_model.net.path=here",
    **{
        f"advantage={name}": GROUPS
        for name, kind in OPTIONS["advantage"][1].items()
        if getattr(kind, "needs_groups", False)
    },
}
EXPERIMENTS = [f"experiment={name}" for name in options("experiment") if name != "none"]
PRESETS = [name for name in options("preset") if name != "none"]


@cache
def composed(*overrides: str) -> Run:
    return compose(list(overrides))


@cache
def covering(stage: str) -> tuple[Run, ...]:
    """Compositions of a stage that together choose every option: of each group one at a time, of all groups at once."""
    read = [group for group in groups() if group not in ("experiment", "preset") and stage in stages_of(f"{group}=x")]
    runs = []
    for part in ([g for g in read if g not in brings()], [g for g in read if g in brings()]):
        # model=tiny comes with reward=adapter, model=digits, which has no adapters, with another; trainer=fsdp with
        # engine=local, as it has no whole weights to give to another; kl=both without a correction
        named = {group: options(group)[:: -1 if group in ("engine", "kl", "model") else 1] for group in part}
        for number in range(max(map(len, named.values()), default=0)):
            chosen = [f"{group}={names[number]}" for group, names in named.items() if number < len(names)]
            runs.append(composed(f"stage={stage}", *chosen, *(NEEDS[option] for option in chosen if option in NEEDS)))
    return tuple(runs)


def with_option(stage: str, option: str) -> Run:
    """A configuration of a stage with this option."""
    group, _, name = option.partition("=")
    return next(run for run in covering(stage) if run.choices.get(group) == name)


def every_option() -> list[str]:
    return [f"{g}={name}" for g in groups() if g not in ("experiment", "preset") for name in options(g)]


def stages_of(option: str) -> list[str]:
    """The stages that read a group."""
    return [stage for stage in STAGES if readable_by(stage, [option])]


def kinds_in(annotation: Any) -> list[type[Node]]:
    """The models that a type may be."""
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return [annotation]
    return [kind for inside in get_args(annotation) for kind in kinds_in(inside)]


def value_of(run: Run, key: str) -> Any:
    """The value of a key or group; None where the run has none."""
    if key in run.choices:
        return run.choices[key]
    node: Any = run.plain()
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
