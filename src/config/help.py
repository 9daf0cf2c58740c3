"""The page that `python -m src.train --help` prints, made of the comments in conf/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from src.config.errors import CONF, SCHEMA, SETS_OTHERS_KEYS, options_of, package_of

USAGE = """\
Train a language model with PPO, or with a stage that comes before it.

  python -m src.train [KEY=VALUE ...] [GROUP=OPTION ...]

  python -m src.train                                      the embedded example: needs no network, some minutes
  python -m src.train stage=sft model=gpt2 data=imdb       supervised fine-tuning of a model of the hub
  python -m src.train model.path=FOLDER reward=vader       PPO from your model, with a reward that is not learned
  python -m src.train reward=function reward.target=my_rewards.brevity     your own function as the reward
  python -m src.train experiment=arithmetic ppo.clip=0.1   a set of choices that belong together, with a change
  python -m src.train -m ppo.clip=0.1,0.2 seed=1,2         a sweep: four runs
  python -m src.pipeline                                   SFT, reward model and PPO, one after the other

The run lies in logs/STAGE/NAME: metrics.csv, samples, checkpoints, the model, result.json. When it is interrupted, the
same command goes on with it."""
AFTERWARDS = """\
stage=sft --help, stage=reward --help: the keys of the other stages; --cfg job: every key there is, with its value
python -m src.memory ...               the memory a run takes, before it starts
python -m src.evaluate, src.chat, src.export RUN         measure, try out and hand on what came of it
docs/: how it works, what each algorithm does, every message on bad input"""
CHOICE = re.compile(r"^  - (?:optional )?/?([\w/]+): +([\w.-]+) *(?:# (.*))?$")
KEY = re.compile(r"^( *)(\w+): *([^#\n]*?) *(?:# (.*))?$", re.MULTILINE)
FILLED_IN = ("run_dir", "overrides", "choices")  # at start, by the program


def help_page(config: DictConfig) -> RenderableType:
    """Usage, the groups with their options, and the keys of the chosen ones with the values they have in `config`."""
    return Group(USAGE, "", _groups(config), "", _keys(config), "", AFTERWARDS)


def _groups(config: DictConfig) -> Table:
    table = _table("group", "chosen", "of", "")
    for group, comment in _choices(config.stage):
        table.add_row(group, str(config.choices.get(group)), Text(", ".join(options_of(group)), "dim"), comment)
    return table


def _keys(config: DictConfig) -> Table:
    table = _table("key", "value", "")
    shown: set[str] = set()
    for title, path in _files(config):
        rows = [
            (key, value, said)
            for key, said in commented_keys(path)
            if key not in shown and (value := _value(config, key)) is not None
        ]
        shown |= {key for key, _, _ in rows}
        if rows:
            table.add_row(Text(title, "bold"))
        for key, value, said in rows:
            table.add_row(f"  {key}", Text(value, "cyan"), said)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    return table


def _choices(stage: str) -> Iterator[tuple[str, str]]:
    """The groups of the defaults lists of train.yaml and of the stage, with their comments."""
    for path in (CONF / "train.yaml", CONF / "stage" / f"{stage}.yaml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = CHOICE.match(line)
            if found:
                yield found[1], found[3] or ""


def _files(config: DictConfig) -> Iterator[tuple[str, Path]]:
    """The files that declare the keys of a run, each with a heading."""
    yield "for every stage", CONF / "train.yaml"
    for group, _ in sorted(_choices(config.stage), key=lambda choice: choice[0] != "stage"):
        option = config.choices.get(group)
        if group not in SETS_OTHERS_KEYS and option is not None:
            yield f"{group}={option}", CONF / group / f"{option}.yaml"
            yield f"{group}", CONF / group / f"{SCHEMA}.yaml"


def _value(config: DictConfig, key: str) -> str | None:
    """A value as the command line takes it; None for what is no value that a person sets."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    names = list(node.keys()) if isinstance(node, DictConfig) else []  # `in node` would hide what is ???
    if key in FILLED_IN or name not in names:
        return None
    value = "???" if OmegaConf.is_missing(node, name) else node[name]
    return None if OmegaConf.is_config(value) else OmegaConf.to_yaml([value]).removeprefix("- ").strip()


def commented_keys(path: Path) -> Iterator[tuple[str, str]]:
    """Dotted keys that have a value and a comment on their line, without Hydra's own settings."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8").split("\nhydra:")[0]
    above: list[tuple[int, str]] = [(-1, part) for part in package_of(path).split(".") if part]
    for found in KEY.finditer(text):
        indent, name, value, comment = len(found[1]), found[2], found[3], found[4]
        while above and above[-1][0] >= indent:
            above.pop()
        above.append((indent, name))
        if value and comment:
            yield ".".join(part for _, part in above), comment
