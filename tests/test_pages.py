"""The pages name files, links, commands, keys and options that exist, and README's formula is the code's."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch

from src.config.compose import compose, readable_by
from src.config.errors import declared
from src.config.files import groups, options
from src.config.schema import RUNS
from src.core import policy_losses
from src.core.masking import masked
from src.core.policy_losses import probability_ratio

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
GENERATED = ("options.md", "errors.md", "checklist.md")  # compared with what writes them elsewhere
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md"))]
WRITTEN = [page for page in PAGES if page.name not in GENERATED]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(
    r"(?:src|tests|conf|docs|benchmarks|studies|examples|templates)/[\w./-]+\.(?:py|md|yaml|json|png|jinja|txt|ipynb)"
)
NODES = "ppo|sft|reward_model|rollout|model|data|reward|callbacks|trainer|nonfinite"
KEY = re.compile(rf"(?<![\w/.])((?:{NODES})\.(?!(?:py|png|json|sbatch)\b)[a-z][\w.]*)")
FIGURES = {"ppo.gold", "ppo.score", "sft.nll_per_token"}  # of result.json, which results_format.md describes
OPEN = ("trainer.", "callbacks.")  # nodes to which users add keys


def ids(page: Path) -> str:
    return page.name


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    titles = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=ids)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(text(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_files_that_are_named_exist(page):
    named = [file for code in CODE.findall(text(page)) for file in FILE.findall(code)]
    assert [
        file for file in named if "*" not in file and not re.search(r"[A-Z]{4}", file) and not (ROOT / file).exists()
    ] == []


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_keys_and_options_that_are_named_exist(page):
    known = {*declared(), *FIGURES}
    nodes = {".".join(key.split(".")[:n]) for key in known for n in (1, 2, 3)}
    for code in CODE.findall(text(page)):
        if page.name != "results_format.md":
            unknown = [key for key in KEY.findall(code) if key not in known | nodes and not key.startswith(OPEN)]
            assert not unknown, code
        for group, option in re.findall(r"(?:^| )(\w+)=([\w.-]+)", code):
            if group in groups() and not option.isupper() and "..." not in option:
                assert option in options(group), code


def commands(page: Path) -> list[str]:
    """The lines of code blocks that start a training command, without comments and continuations."""
    lines = text(page).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|# |\$ )(python -m src\.(?:train|pipeline)\b[^#`]*)", line.strip()) for line in lines]
    return [match[1] for match in found if match and "..." not in match[1]]


@pytest.mark.parametrize("page", [page for page in WRITTEN if commands(page)], ids=ids)
def test_commands_compose(page):
    for command in commands(page):
        _, _, module, *words = shlex.split(command)
        overrides = [re.sub(r"=S$", "=1", word) for word in words if "=" in word]
        if "-m" in words:
            overrides = [re.sub(r",.*", "", override) for override in overrides if not override.startswith("hydra")]
        if module == "src.train":
            compose(overrides)
        else:
            for stage in RUNS:
                compose([f"stage={stage}", *readable_by(stage, overrides)])


def test_modules_that_are_named_exist():
    for page in PAGES:
        for module in re.findall(r"python -m ((?:src|studies|benchmarks|tests|examples)(?:\.\w+)+)", text(page)):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), (page.name, module)


def test_the_index_lists_every_page_once():
    listed = re.findall(r"^\d+\. \[([\w.]+\.md)\]", text(ROOT / "docs/README.md"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS if page.name != "README.md")


@pytest.mark.parametrize("group", ["advantage", "policy_loss"])
def test_every_estimator_and_loss_has_its_formula_on_the_page(group):
    page = text(ROOT / "docs/theory.md")
    missing = [name for name in options(group) if not re.search(rf"`({group}=)?{name}`", page)]
    assert not missing, f"add {', '.join(missing)} to docs/theory.md, with formula and source"


def test_readme_is_short():
    assert len(text(ROOT / "README.md").splitlines()) <= 120


def test_the_surrogate_of_the_readme_is_that_of_the_code():
    (block,) = re.findall(r"```python\n(def clipped_surrogate.*?)```", text(ROOT / "README.md"), re.DOTALL)
    names = {"torch": torch, "masked": masked, "probability_ratio": probability_ratio}
    exec(block, names)
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 5, 3, 1, 6]).unsqueeze(1)
    for low, high in ((0.2, 0.2), (0.1, 0.3)):
        loss, stats = names["clipped_surrogate"](logprobs, old, advantages, mask, low, high)
        expected, expected_stats = policy_losses.clipped_surrogate(logprobs, old, advantages, mask, low, high)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(stats, expected_stats)
        assert 0 < stats["clip_fraction"].sum() < mask.sum()
