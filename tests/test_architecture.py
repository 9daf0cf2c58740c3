"""The rules that every file under src obeys, each with an offender that shows the rule can fail."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ENTRY = "entry"  # src/*.py other than types.py and errors.py
ORDER = [  # an import goes from a later line to an earlier one, or stays in its room
    ["types"],  # types.py and errors.py
    ["core"],
    ["utils"],
    ["kernels"],
    ["models"],
    ["rewards", "data"],
    ["rollout"],
    ["modules"],
    ["loggers"],
    ["config"],
    ["checkpointing"],
    ["report"],
    ["callbacks"],
    ["stages"],
    ["memory"],
    ["plan"],
    ["runs"],
    ["evaluate"],
    [ENTRY, "chat", "doctor", "export"],
]
LAYERS = {room: layer for layer, rooms in enumerate(ORDER) for room in rooms}
IMPORT_HYDRA = {ENTRY, "config", "stages", "runs", "export"}
NAME_LOGGERS = {"loggers"}
CORE_MAY_IMPORT = (
    *("torch", "jaxtyping", "src.types", "src.errors", "src.core"),
    *("__future__", "abc", "collections.abc", "dataclasses", "functools", "math", "typing"),
)
LONGEST_FUNCTION = 40  # lines from `def` to the end, docstring excluded
LONGEST_FILE = 300  # lines

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Definition = FunctionNode | ast.ClassDef


@dataclass(frozen=True)
class Module:
    """A parsed source file."""

    path: Path  # relative to the repository root
    source: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder under src; `ENTRY` for src/*.py, but types.py, errors.py, __init__.py are "types"."""
        if len(self.path.parts) > 2:
            return self.path.parts[1]
        return "types" if self.path.stem in {"types", "errors", "__init__"} else ENTRY

    def problem(self, line: int, text: str) -> str:
        return f"{self.path}:{line}: {text}"


def read_module(root: Path, path: Path) -> Module:
    source = path.read_text(encoding="utf-8")
    return Module(path.relative_to(root), source, ast.parse(source, filename=str(path)))


def read_modules(root: Path) -> list[Module]:
    return [read_module(root, path) for path in sorted((root / "src").rglob("*.py"))]


def imported_names(module: Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported anywhere in the file; `from a import b` gives "a.b"."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.path.parent.parts[: len(module.path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join((*package, *filter(None, [node.module])))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def functions(module: Module) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(module.tree) if isinstance(node, FunctionNode))


def code_lines(function: FunctionNode) -> int:
    """Lines from `def` to the end of the function, those of its docstring not counted."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def public_definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Functions and classes without a leading underscore, methods included, nested functions not."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def repeats_documented(node: Definition) -> bool:
    """True for an overload or a declared override: another definition carries the docstring."""
    names = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    return bool(names & {"overload", "override"})


# ----------------------------------------------------------------------------------------------------------- the rules


def imports_point_one_way(module: Module) -> list[str]:
    own = module.room
    if own not in LAYERS:
        return [module.problem(1, f"src/{own} has no place in ORDER")]
    problems = []
    for line, name in imported_names(module):
        if not is_within(name, "src"):
            continue
        room = name.split(".")[1] if "." in name else "types"
        target = "types" if room == "errors" else room if room in LAYERS else ENTRY
        if target != own and LAYERS[target] >= LAYERS[own]:
            problems.append(module.problem(line, f"{own} may not import {name} ({target})"))
    return problems


def only_configuration_imports_hydra(module: Module) -> list[str]:
    if module.room in IMPORT_HYDRA:
        return []
    return [
        module.problem(line, f"{module.room} may not import {name}; it takes plain values")
        for line, name in imported_names(module)
        if is_within(name, "hydra") or is_within(name, "omegaconf")
    ]


def only_loggers_name_a_logger(module: Module) -> list[str]:
    def is_logger(name: str) -> bool:
        root, *rest = name.split(".")
        return root == "wandb" or (root in {"lightning", "pytorch_lightning", "lightning_fabric"} and "loggers" in rest)

    if module.room in NAME_LOGGERS:
        return []
    return [
        module.problem(line, f"only src/loggers and conf name a logger, not {module.room}: {name}")
        for line, name in imported_names(module)
        if is_logger(name)
    ]


def core_imports_torch_alone(module: Module) -> list[str]:
    if module.room != "core":
        return []
    return [
        module.problem(line, f"core may not import {name}")
        for line, name in imported_names(module)
        if not any(is_within(name, allowed) for allowed in CORE_MAY_IMPORT)
    ]


def functions_and_files_are_short(module: Module) -> list[str]:
    problems = [
        module.problem(function.lineno, f"{function.name} has {code_lines(function)} lines, {LONGEST_FUNCTION} allowed")
        for function in functions(module)
        if code_lines(function) > LONGEST_FUNCTION
    ]
    lines = len(module.source.splitlines())
    if lines > LONGEST_FILE:
        problems.append(module.problem(lines, f"the file has {lines} lines, {LONGEST_FILE} allowed"))
    return problems


def public_names_have_docstrings(module: Module) -> list[str]:
    problems = [] if ast.get_docstring(module.tree) else [module.problem(1, "the module has no docstring")]
    return problems + [
        module.problem(node.lineno, f"{node.name} has no docstring")
        for node in public_definitions(module.tree.body)
        if not ast.get_docstring(node) and not repeats_documented(node)
    ]


def no_error_is_swallowed(module: Module) -> list[str]:
    def does_nothing(node: ast.stmt) -> bool:
        return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))

    return [
        module.problem(node.lineno, "this handler swallows the error")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and all(does_nothing(statement) for statement in node.body)
    ]


def nothing_is_left_for_later(module: Module) -> list[str]:
    return [
        module.problem(line, f"{found.group()}: finish it, or open an issue")
        for line, text in enumerate(module.source.splitlines(), start=1)
        if (found := re.search(r"\b(TODO|FIXME|XXX)\b", text))
    ]


RULES: list[Callable[[Module], list[str]]] = [
    imports_point_one_way,
    only_configuration_imports_hydra,
    only_loggers_name_a_logger,
    core_imports_torch_alone,
    functions_and_files_are_short,
    public_names_have_docstrings,
    no_error_is_swallowed,
    nothing_is_left_for_later,
]

# ----------------------------------------------------------------------------------------------- what each must catch


def function_of(lines: int, docstring: str = "") -> str:
    """A function of `lines` lines of code, `def` included."""
    return "\n".join(["def f():", *([f"    {docstring}"] if docstring else []), *["    g()"] * (lines - 1), ""])


LONG_DOCSTRING = '"""' + "Text.\n" * 50 + '    """'

OFFENDERS = [
    # a rule, a file that breaks it once, the file's content
    (imports_point_one_way, "src/types.py", "from src.core import masking"),
    (imports_point_one_way, "src/__init__.py", "from src import core"),
    (imports_point_one_way, "src/core/kl.py", "from src.models import lora"),
    (imports_point_one_way, "src/core/kl.py", "from src.utils import streams"),
    (imports_point_one_way, "src/core/kl.py", "from ..rollout.engine import sample"),
    (imports_point_one_way, "src/models/lora.py", "import src.rewards.verifier"),
    (imports_point_one_way, "src/data/text.py", "from src import rewards"),
    (imports_point_one_way, "src/rollout/engine.py", "def f():\n    from src.modules import ppo"),
    (imports_point_one_way, "src/modules/ppo.py", "from src.callbacks.rollout import RolloutCallback"),
    (imports_point_one_way, "src/callbacks/samples.py", "from src.train import main"),
    (imports_point_one_way, "src/utils/run.py", "from src.train import main"),
    (imports_point_one_way, "src/misc/helpers.py", "import math"),
    (only_configuration_imports_hydra, "src/models/lora.py", "import hydra.utils"),
    (only_configuration_imports_hydra, "src/types.py", "from omegaconf import DictConfig"),
    (only_loggers_name_a_logger, "src/train.py", "import wandb"),
    (only_loggers_name_a_logger, "src/modules/ppo.py", "from lightning.pytorch import loggers"),
    (only_loggers_name_a_logger, "src/utils/run.py", "from lightning.pytorch.loggers import CSVLogger"),
    (core_imports_torch_alone, "src/core/kl.py", "import numpy as np"),
    (core_imports_torch_alone, "src/core/kl.py", "from collections import defaultdict"),
    (core_imports_torch_alone, "src/core/kl.py", "from torchmetrics import Metric"),
    (core_imports_torch_alone, "src/core/kl.py", "from src.models import lora"),
    (functions_and_files_are_short, "src/core/kl.py", function_of(LONGEST_FUNCTION + 1)),
    (functions_and_files_are_short, "src/core/kl.py", function_of(LONGEST_FUNCTION + 1, LONG_DOCSTRING)),
    (functions_and_files_are_short, "src/core/kl.py", "async " + function_of(LONGEST_FUNCTION + 1)),
    (functions_and_files_are_short, "src/core/kl.py", "x = 1\n" * (LONGEST_FILE + 1)),
    (public_names_have_docstrings, "src/core/kl.py", "x = 1"),
    (public_names_have_docstrings, "src/core/kl.py", '"""Text."""\ndef f(): ...'),
    (public_names_have_docstrings, "src/core/kl.py", '"""Text."""\nclass A: ...'),
    (public_names_have_docstrings, "src/core/kl.py", '"""Text."""\nclass A:\n    """Text."""\n    def f(self): ...'),
    (no_error_is_swallowed, "src/core/kl.py", "try:\n    f()\nexcept ValueError:\n    pass"),
    (no_error_is_swallowed, "src/core/kl.py", "try:\n    f()\nexcept:\n    ..."),
    (nothing_is_left_for_later, "src/core/kl.py", "x = 1  # TODO: y"),
    (nothing_is_left_for_later, "src/core/kl.py", '"""FIXME"""'),
    (nothing_is_left_for_later, "src/core/kl.py", "# XXX"),
]

INNOCENTS = [
    (imports_point_one_way, "src/core/kl.py", "from .masking import masked_mean\nfrom src.types import Rollout"),
    (imports_point_one_way, "src/models/lora.py", "from src.utils import seeding\nfrom src.core import kl"),
    (imports_point_one_way, "src/utils/run.py", "from src.types import Rollout\nfrom src.utils import seeding"),
    (imports_point_one_way, "src/pipeline.py", "from src.train import main\nfrom src.callbacks import timing"),
    (imports_point_one_way, "src/core/kl.py", "import srcset.models"),
    (only_configuration_imports_hydra, "src/train.py", "import hydra\nfrom omegaconf import DictConfig"),
    (only_configuration_imports_hydra, "src/config/run.py", "import hydra"),
    (only_loggers_name_a_logger, "src/loggers/csv.py", "from lightning.pytorch.loggers import CSVLogger"),
    (only_loggers_name_a_logger, "src/modules/ppo.py", "import lightning as L"),
    (core_imports_torch_alone, "src/core/kl.py", "import math\nimport torch.nn.functional as F"),
    (core_imports_torch_alone, "src/models/lora.py", "import peft"),
    (functions_and_files_are_short, "src/core/kl.py", function_of(LONGEST_FUNCTION, LONG_DOCSTRING)),
    (functions_and_files_are_short, "src/core/kl.py", "x = 1\n" * LONGEST_FILE),
    (public_names_have_docstrings, "src/core/kl.py", '"""Text."""\ndef _f():\n    class A: ...'),
    (public_names_have_docstrings, "src/core/kl.py", '"""Text."""\n@typing.override\ndef f(): ...'),
    (no_error_is_swallowed, "src/core/kl.py", "try:\n    f()\nexcept ValueError:\n    x = None"),
    (nothing_is_left_for_later, "src/core/kl.py", "METHOD = 'XXXL'"),
]


def problems_of(rule: Callable[[Module], list[str]], root: Path, path: str, source: str) -> list[str]:
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    (module,) = read_modules(root)
    return rule(module)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_obeys(rule):
    modules = read_modules(ROOT)
    assert modules
    problems = [problem for module in modules for problem in rule(module)]
    assert not problems, "\n".join(["", *problems])


@pytest.mark.parametrize(("rule", "path", "source"), OFFENDERS)
def test_rule_catches_an_offender(tmp_path, rule, path, source):
    problems = problems_of(rule, tmp_path, path, source)
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:")


@pytest.mark.parametrize(("rule", "path", "source"), INNOCENTS)
def test_rule_lets_an_innocent_pass(tmp_path, rule, path, source):
    assert problems_of(rule, tmp_path, path, source) == []


def test_every_rule_is_tried_both_ways():
    assert {rule for rule, _, _ in OFFENDERS} == set(RULES) == {rule for rule, _, _ in INNOCENTS}
