"""`python -m src.train --help`: what a newcomer reads first, made of the files under conf/."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys

import pytest
from rich.console import Console

from src.config.compose import compose
from src.config.errors import groups
from src.config.help import USAGE, commented_keys, help_page

NOT_CHOSEN = {"recipe", "reward_net"}  # follow from other choices; the second is a choice of stage=reward alone


def page(*overrides: str) -> str:
    """The page on a screen so wide that nothing is folded."""
    screen = io.StringIO()
    Console(file=screen, width=400).print(help_page(compose(list(overrides))))
    return screen.getvalue()


def value_of(text: str, key: str) -> str:
    """What the page says a key is set to."""
    (found,) = re.findall(rf"^  {re.escape(key)} +(\S+)", text, flags=re.MULTILINE)
    return found


def test_the_page_names_every_group_and_what_is_chosen_in_it():
    text = page("policy_loss=dual_clip")
    table = text.partition("\ngroup ")[2].partition("\nkey ")[0]
    named = dict(re.findall(r"^(\w+) +(\w+) ", table, flags=re.MULTILINE))
    assert groups() - NOT_CHOSEN <= set(named)
    assert named["policy_loss"] == "dual_clip"
    assert "reward_net" in page("stage=reward")


@pytest.mark.parametrize(
    ("overrides", "key", "shown"),
    [
        (["ppo.clip=0.3"], "ppo.clip", "0.3"),
        (["ppo.early_stop_kl=null"], "ppo.early_stop_kl", "null"),
        (["ppo.whiten_rewards=true"], "ppo.whiten_rewards", "true"),
        (["data=custom"], "data.path", "???"),
        (["stage=sft", "sft.lr=0.5"], "sft.lr", "0.5"),
        (["model=gpt2"], "model.path", "openai-community/gpt2"),
    ],
)
def test_each_value_is_that_of_the_composed_configuration(overrides, key, shown):
    """Also when it was given on the command line beside --help; written as the command line takes it."""
    assert value_of(page(*overrides), key) == shown


def test_no_key_is_shown_twice_or_without_an_explanation():
    rows = re.findall(r"^  ([\w.]+\.\w+) +(\S.*)$", page().partition("for every stage")[2], flags=re.MULTILINE)
    keys = [key for key, _ in rows]
    assert len(keys) == len(set(keys)) > 60
    assert all(len(said.split()) > 1 for _, said in rows)


def test_knobs_of_options_that_are_not_chosen_stay_away():
    table = page("policy_loss=reinforce").partition("for every stage")[2]
    assert "ppo.epochs" in table
    assert "ppo.clip" not in table


def test_every_command_of_the_usage_composes():
    commands = re.findall(r"^  python -m src\.train ([^A-Z\[]*?)(?:  .*)?$", USAGE.replace("FOLDER", "f"), re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        compose([word.split(",")[0] for word in shlex.split(command) if word != "-m"])


def test_comments_are_found_at_the_place_their_key_has(tmp_path, monkeypatch):
    (tmp_path / "g").mkdir()
    path = tmp_path / "g" / "o.yaml"
    path.write_text("# @package ppo\na: 1  # one\nb:\n  c: x  # two\nd: 4\nhydra:\n  e: 5  # not ours\n")
    monkeypatch.setattr("src.config.errors.CONF", tmp_path)
    assert list(commented_keys(path)) == [("ppo.a", "one"), ("ppo.b.c", "two")]


def test_help_on_the_command_line():
    """The flag, beside an override: the page, and a wrong override its sentence."""
    command = [sys.executable, "-m", "src.train", "--help"]
    done = subprocess.run([*command, "ppo.clip=0.25"], capture_output=True, text=True)
    assert done.returncode == 0
    assert re.search(r"ppo\.clip +0\.25", done.stdout)
    wrong = subprocess.run([*command, "ppo.clipp=0.25"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "ppo.clip" in wrong.stderr
