"""Mutate every line of `src/core`, and count the mutants that the tests of `tests/core` kill.

    python -m benchmarks.mutants

mutmut refuses a package called `src`, so a copy under another name is mutated. Writes benchmarks/results/mutants.md:
the share of killed mutants, and the survivors with what they change. Mutants that only change the words of a message
are left out. Needs the extra `study`: pip install -c constraints.txt -e '.[dev,study]'.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
NAME = "corecopy"
# equivalent mutants: part of the changed line -> why nothing can tell the difference
EQUIVALENT = {
    "(advantages <= 0)": "where A = 0 bound and loss are both 0, and 0 < 0 is false",
    "(bound <= loss)": "at a tie both give the same loss; only the indicator of the tie differs",
    "clamp(None, MAX_LOG_RATIO)": "exp(-20) and exp of less are both 0 to 2e-9",
    "reinforce(logprobs, None": "REINFORCE does not read the old logprobs",
    "scaled.isneginf(), 1)": "multiplied by a probability of 0",
    "device=None": "the tests run on the CPU only",
    "dtype=x.dtype, )": "the tests run on the CPU only",
    "mask.shape[-1], )": "the tests run on the CPU only",
    "dim=+1": "the last dimension of a matrix is dimension 1",
    "mask.shape[+1]": "the last dimension of a matrix is dimension 1",
    "if len(x) else 1.0": "an empty batch has no weight",
    "weights.to(None)": "the product has the wider type anyway",
    "torch.tensor(row, dtype=None)": "whole numbers become int64 by default",
    "torch.tensor(row, )": "whole numbers become int64 by default",
    "variance >= 1e-10": "at exactly the threshold only",
    "scale >= 0": "where the scale is 0 the product is 0 as well",
}


def copy(folder: Path) -> None:
    """`src` under the other name, `tests/core`, and mutmut's settings; `src/core` alone is mutated."""
    shutil.copytree(ROOT / "src", folder / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests/core", folder / "tests/core", ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"\bsrc\b", NAME, text), encoding="utf-8")
    (folder / "setup.cfg").write_text(
        f"[mutmut]\npaths_to_mutate={NAME}/core\ntests_dir=tests\nalso_copy={NAME}\n", encoding="utf-8"
    )
    # mutmut adds functions to the modules, which one test counts; shapes are checked by tests/conftest.py only
    contracts = "tests/core/test_contracts.py::test_"
    others = ("every_function", "numbers_of_another_shape", "a_mask_of_numbers")
    left_out = " ".join(f"--deselect {contracts}{name}" for name in others)
    (folder / "pyproject.toml").write_text(
        f"[tool.pytest.ini_options]\npythonpath = ['.']\n"
        f"addopts = '-x -q {left_out} --ignore tests/core/test_shapes.py'\n",
        encoding="utf-8",
    )


def statuses(folder: Path) -> dict[str, str]:
    """Mutant -> killed, survived, timeout, ..."""
    lines = mutmut(folder, "results", "--all", "true").splitlines()
    pairs = [line.strip().split(": ") for line in lines if ": " in line]
    return {name: status for name, status in pairs}


def mutmut(folder: Path, *arguments: str) -> str:
    """The output of a mutmut command."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def changed(folder: Path, name: str) -> tuple[str, str]:
    """The line before and after the change."""
    lines = mutmut(folder, "show", name).splitlines()
    removed, added = ([line[1:].strip() for line in lines if re.match(rf"\{sign}(?!\{sign})", line)] for sign in "-+")
    return " ".join(removed), " ".join(added)


def only_words(before: str, after: str) -> bool:
    """Whether two lines differ inside string literals only, or in a message that became None."""
    plain = [re.sub(r"f?\"[^\"]*\"|f?'[^']*'|\bNone\b", "''", line) for line in (before, after)]
    return plain[0] == plain[1] and '"' in before


def main() -> None:
    """Run, count, write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(folder)
        subprocess.run([sys.executable, "-m", "mutmut", "run", "--max-children", "2"], cwd=folder, check=False)
        found = statuses(folder)
        survivors = {name: changed(folder, name) for name, status in found.items() if status == "survived"}
        others = {name: status for name, status in found.items() if status not in ("survived", "killed", "timeout")}
    survivors = {name: lines for name, lines in survivors.items() if not only_words(*lines)}
    counted = sum(status in ("killed", "timeout") for status in found.values()) + len(survivors)
    share = 1 - len(survivors) / counted
    rows = [f"| `{b}` | `{a}` | {reason(b, a)} |" for b, a in survivors.values()]
    RESULTS.mkdir(exist_ok=True)
    text = [
        "# Mutants of src/core\n",
        f"{counted - len(survivors)} of {counted} killed ({share:.1%}); not run by any test: {len(others)}.\n",
        "| line | mutant that survives | why |", "|---|---|---|", *rows,
    ]  # fmt: skip
    (RESULTS / "mutants.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))
    print(others)


def reason(before: str, after: str) -> str:
    """Why a survivor is equivalent, if that is known."""
    return next((why for part, why in EQUIVALENT.items() if part in after), "")


if __name__ == "__main__":
    main()
