"""A dotted path that leads to nothing is answered with what is there instead, and where."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.errors import ConfigError
from src.stages.objects import instantiate
from src.stages.targets import dotted

FILES = {
    "my_scores.py": "LIMIT = 3\ndef brevity(p, r, m): return [1.0 for _ in r]\ndef two(p, r): ...\nclass A: ...\n",
    "my_empty.py": "",
    "my_imports.py": "import json\nimport torchmetrics_nope\n",
    "my_error.py": "raise RuntimeError('no key set')\n",
    "my_syntax.py": "x = 1\ndef f(:\n",
    "my_deep.py": "import json\njson.loads('{')\n",
    "my_package/__init__.py": "",
    "my_package/part.py": "import my_error\n",
    "my_exit.py": "import sys\nsys.exit(3)\n",
}
REFUSED = {
    "my_scores.brevityy": "my_scores.py has no brevityy; close to it: brevity",
    "my_scores.zzz": "my_scores.py has no zzz; it has brevity, two, A",
    "my_scores.A.bc": "A has no bc",
    "my_empty.f": "my_empty.py has no f",
    "my_package.f": "my_package/__init__.py has no f",
    "my_package.part.f": "importing my_package/part.py raised RuntimeError('no key set') (line 1)",
    "my_scorez.brevity": "there is no module my_scorez in {cwd} (the working directory) or among the installed "
    "packages; close to it: my_scores",
    "zzz.f": "there is no module zzz in {cwd} (the working directory) or among the installed packages",
    "my_imports.f": "importing my_imports.py failed: No module named 'torchmetrics_nope' (line 2)",
    "my_error.f": "importing my_error.py raised RuntimeError('no key set') (line 1)",
    "my_syntax.f": "importing my_syntax.py failed: invalid syntax (line 2)",
    "my_deep.f": "importing my_deep.py raised JSONDecodeError('Expecting property name enclosed in double quotes: "
    "line 1 column 2 (char 1)') (line 2)",
    "my_scores:brevity": "write it with dots and without .py: my_scores.brevity",
    "my_scores.py": "write it with dots and without .py: my_scores.FUNCTION",
    "./my_scores.py": "write it with dots and without .py: my_scores.FUNCTION",
    ".brevity": "write it with dots and without .py: brevity.FUNCTION",
    "my_scores..brevity": "write it with dots and without .py: my_scores.brevity",
    "my_scores.LIMIT": "is a value, not a {what}: it cannot be called",
    "my_scores": "is a module, not a {what}; give my_scores.brevity or my_scores.two or my_scores.A",
    "my_package": "is a module, not a {what}; give my_package.{WHAT}",
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The working directory, with modules of all kinds."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def refusal(node: dict[str, Any], key: str) -> str:
    with pytest.raises(ConfigError) as refused:
        instantiate(node, key)
    return str(refused.value)


@pytest.mark.parametrize("target", REFUSED)
def test_each_path_gets_its_sentence(target: str) -> None:
    """For a function that is a reward, and for a class of any other key."""
    function = {"_target_": target, "_partial_": True}
    reward = {"_target_": "src.rewards.function.FunctionReward", "target": target, "function": function}
    for node, key, named, what in (
        (reward, "reward", f"reward.target={target}", "function"),
        ({"_target_": target}, "data", f"data._target_={target}", "class"),
        ({"_target_": "builtins.dict", "mine": {"_target_": target}}, "data", f"data.mine._target_={target}", "class"),
    ):
        filled = REFUSED[target].format(cwd=Path.cwd(), what=what, WHAT=what.upper())
        assert refusal(node, key) == f"{named}: {filled}"


def test_a_module_that_ends_the_program_and_a_function_of_other_parameters() -> None:
    assert refusal({"_target_": "my_exit.f"}, "data") == "data: its target ended the program by sys.exit(3)"
    function = {"_target_": "my_scores.two", "_partial_": True}
    node = {"_target_": "src.rewards.function.FunctionReward", "target": "my_scores.two", "function": function}
    allowed = "must be a function of (prompts, responses, metadata)"
    assert refusal(node, "gold_reward") == f"gold_reward.target='my_scores.two': {allowed}"
    assert refusal(node | {"_partial_": False}, "reward") == f"reward.target='my_scores.two': {allowed}"


def test_a_path_is_written_with_dots() -> None:
    for given, meant in {
        "a:b": "a.b",
        "a.py:b": "a.b",
        "./a/b.py:c": "a.b.c",
        "a/b.py": "a.b",
        "a.py": "a.FUNCTION",
        "a.pyx.b": "a.pyx.b",
    }.items():
        assert dotted(given) == meant
