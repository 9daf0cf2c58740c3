"""What a formula takes and gives has the shape and dtype of its signature: checked in the tests, never in a run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

import src.core
from src.core import advantages, masking, policy_losses, preference, rewards, value_losses
from src.core.estimators import GAE
from src.types import Episodes

SQUARE = torch.ones(3, 3)  # B = T: torch would broadcast (B,) over it without a word
FEW = torch.ones(3)
MASK = SQUARE.bool()


def test_one_advantage_per_sequence_is_no_advantage_per_token() -> None:
    """(B,) advantages with B = T: each would be credited to one place of every row."""
    with pytest.raises(TypeCheckError, match="advantages"):
        policy_losses.clipped_surrogate(SQUARE, SQUARE, FEW, MASK, 0.2, 0.2)
    loss, _ = policy_losses.clipped_surrogate(SQUARE, SQUARE, advantages.per_token(FEW, MASK), MASK, 0.2, 0.2)
    assert loss.shape == (3, 3)


REFUSED: dict[str, Callable[[], Any]] = {
    "logprobs of another length": lambda: policy_losses.surrogate(SQUARE[:, :2], SQUARE, SQUARE, MASK),
    "a mask of whole numbers": lambda: masking.masked_mean(SQUARE, MASK.long()),
    "a mask of one row": lambda: masking.masked(SQUARE, MASK[0]),
    "returns of whole numbers": lambda: value_losses.squared_error(SQUARE, SQUARE.long(), MASK),
    "one value too many, after the last token": lambda: advantages.gae(SQUARE, torch.ones(3, 4), MASK, 1.0, 1.0),
    "a score per token": lambda: rewards.token_rewards(SQUARE, SQUARE, SQUARE, MASK, 0.1),
    "scores as a column": lambda: preference.pairwise_loss(FEW.unsqueeze(1), FEW),
    "a list": lambda: preference.pairwise_accuracy([1.0], [0.0]),  # type: ignore[arg-type]
    "groups of fewer rows": lambda: advantages.leave_one_out(FEW, torch.zeros(2, dtype=torch.int64)),
    "values of a record": lambda: GAE(gamma=1.0, critic_lam=1.0, lam=1.0).advantages(
        Episodes(rewards=SQUARE, mask=MASK, group_ids=torch.arange(3), old_values=FEW)
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    with pytest.raises(TypeCheckError):
        REFUSED[what]()


def test_a_result_is_checked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.core.advantages.masked", lambda x, mask: x[0])
    with pytest.raises(TypeCheckError, match="return value"):
        advantages.per_token(FEW, MASK)


def signatures(path: Path) -> dict[str, list[ast.expr | None]]:
    """The annotations of every public function and method, its result last."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and (n.name[0] != "_" or n.name == "__call__")]
    return {
        f"{path.name}:{n.lineno} {n.name}": [
            *(a.annotation for a in [*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs] if a.arg != "self"),
            n.returns,
        ]
        for n in nodes
    }


def test_every_public_function_says_the_shapes_of_its_tensors() -> None:
    """No annotation is missing, and none is a bare `Tensor`."""
    files = sorted(Path(src.core.__path__[0]).glob("*.py"))
    every = {where: given for file in files for where, given in signatures(file).items()}
    assert len(every) > 60
    bare = {
        where
        for where, given in every.items()
        if any(x is None or "Tensor" in {n.id for n in ast.walk(x) if isinstance(n, ast.Name)} for x in given)
    }
    assert not bare


def test_a_run_checks_nothing() -> None:
    """Without the tests' import hook the functions are as they are written, and typeguard is not even there."""
    code = (
        "import sys, torch; from src.core.policy_losses import clipped_surrogate as f;"
        "x = torch.ones(3, 3); f(x, x, x[0], x.bool(), 0.2, 0.2);"
        "print(hasattr(f, '__wrapped__'), 'typeguard' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["False", "False"], done.stderr
