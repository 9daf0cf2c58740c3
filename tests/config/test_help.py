"""`python -m src.train --help` and docs/options.md: what a newcomer reads first, made of the files under conf/."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from src import train
from src.config.compose import compose
from src.config.files import CONF, brings, commented_keys, groups, options
from src.config.help import commented_groups, help_page
from src.config.schema import OPTIONS
from tests.config.composed import ROOT, STAGES, composed
from tests.config.page import PAGE, page


def shown(*overrides: str, width: int = 400) -> str:
    """What is listed on a screen that is so wide that nothing is folded."""
    screen = io.StringIO()
    Console(file=screen, width=width).print(help_page(composed(*overrides)))
    return screen.getvalue()


def value_of(text: str, key: str) -> str:
    (found,) = re.findall(rf"^  {re.escape(key)}=(\S+)", text, flags=re.MULTILINE)
    return str(found)


def test_every_group_that_the_stage_reads_is_named_with_its_choice_and_its_options() -> None:
    for stage in STAGES:
        run = composed(f"stage={stage}")
        listed = dict(re.findall(r"^  (\w+)=([\w.-]+)", shown(f"stage={stage}").partition("\nevery stage")[0], re.M))
        read = {g for g, (node, _) in OPTIONS.items() if node in type(run).model_fields}
        read |= {"experiment", "logger", "callbacks"} | ({"preset"} if stage == "ppo" else set())
        assert listed == {group: run.choices[group] for group in read if group in run.choices}
    assert "(clipped, mse)" in shown()
    assert "value_loss=" not in shown("advantage=rloo", "rollout.samples_per_prompt=4").partition("\nevery stage")[0]


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        ("ppo.clip=0.3", "ppo.clip", "0.3"),
        ("ppo.early_stop_kl=null", "ppo.early_stop_kl", "null"),
        ("ppo.whiten_rewards=true", "ppo.whiten_rewards", "true"),
        ("stage=sft sft.lr=0.5", "sft.lr", "0.5"),
        ("model=gpt2", "model.path", "openai-community/gpt2"),
        ("model.lora.targets=[c_attn]", "model.lora.targets", "['c_attn']"),
    ],
)
def test_each_value_is_that_of_the_composed_configuration(overrides: str, key: str, text: str) -> None:
    """Also when it was given on the command line beside --help; written as the command line takes it."""
    assert value_of(shown(*overrides.split()), key) == text


def test_every_key_with_a_comment_is_shown_once_with_it() -> None:
    rows = re.findall(r"^  ([\w.]+)=\S+ +(\S.*)$", shown().partition("\nevery stage")[2], flags=re.MULTILINE)
    keys = [key for key, _ in rows]
    assert len(keys) == len(set(keys)) > 60
    assert {meaning.strip() for _, meaning in rows if len(meaning.split()) == 1} <= {"width"}
    written = {key for key, _, _ in commented_keys(CONF / "stages" / "ppo.yaml")}
    assert written <= set(keys)


def test_keys_of_options_that_are_not_chosen_stay_away() -> None:
    table = shown("policy_loss=reinforce").partition("\nevery stage")[2]
    assert "ppo.epochs" in table
    assert "ppo.clip" not in table
    assert "reward_model." not in table


def test_groups_that_are_brought_along_follow_the_group_that_brings_them() -> None:
    order = [group for group, comment in commented_groups() if comment]
    assert sorted(order) == groups()
    for other, parents in brings().items():
        assert order.index(other) > max(order.index(parent) for parent in parents)


def test_the_page_fits_into_80_columns_without_breaking_a_word() -> None:
    wide = set(shown().split())
    assert set(shown(width=80).split()) <= wide
    assert max(map(len, (train.__doc__ or "").splitlines())) <= 80


def test_every_command_of_the_usage_composes() -> None:
    commands = re.findall(r"^  (\S*[=-]\S.*?)  +\S", (train.__doc__ or "").replace("FOLDER", "f"), re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command.replace("--cfg job", "").replace("--help", ""))
        compose([word.split(",")[0] for word in words if word != "-m"])


def test_the_page_of_options_is_made_from_conf() -> None:
    text = page()
    assert PAGE.read_text(encoding="utf-8") == text, "run `python -m tests.config`"
    for group in groups():
        assert f"\n## {group}\n" in text
        assert all(f"\n**{group}={option}**: " in text for option in options(group))
    for path in CONF.rglob("*.yaml"):
        if path.parent.name not in ("experiment", "preset"):
            assert all(f"| `{key}` | `{value}` |" in text for key, value, _ in commented_keys(path))


LIGHT = """
import sys
import src.train
for line in sys.stdin.read().splitlines():
    sys.argv = ["src.train", *line.split()]
    try:
        src.train.main()
    except SystemExit as stopped:
        print("exit", stopped.code)
print("loaded:", *{"torch", "lightning", "transformers", "datasets", "wandb", "peft"} & set(sys.modules))
"""


def test_what_trains_nothing_loads_neither_torch_nor_lightning(tmp_path: Path) -> None:
    """--help, --cfg job and a misspelled key, with overrides and without; each with its answer and exit code."""
    asked = "--help\nppo.clip=0.25 --help\n--cfg job\n-c job stage=sft\nppo.clipp=0.25\n--help ppo.clipp=0.25\n"
    asked += (
        f"-m ppo.clipp=0.1,0.2 log_dir={tmp_path}\n-m ppo.clip=0.1,abc\n-m policy_loss=nope,clip log_dir={tmp_path}\n"
    )
    command = [sys.executable, "-c", LIGHT]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded:"
    assert re.search(r"ppo\.clip=0\.25", done.stdout)
    assert "\nstage: ppo\n" in done.stdout
    assert "\nstage: sft\n" in done.stdout
    assert done.stderr.count("error: ppo.clipp=0.25: there is no key ppo.clipp; close to it: ppo.clip") == 2
    assert done.stderr.count("error: ppo.clipp=0.1: there is no key ppo.clipp; close to it: ppo.clip") == 1
    assert done.stderr.count("error: ppo.clip='abc': must be a number") == 1
    assert done.stderr.count("error: policy_loss=nope: there is no such option") == 1
    assert done.stdout.count("exit 2") == done.stderr.count("\n") == 5
