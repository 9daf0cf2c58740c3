"""The command and its table: readable at 80 columns, exit code 1 on a fault; and what examining leaves as it was."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from src.doctor.table import summary, table_of
from src.models.roles import build_roles
from src.rollout.kl_controller import AdaptiveKL
from src.rollout.shaping import Normalize, ScoreShaping, SetMissingEos
from src.utils.check import Check, checked
from tests.doctor.patients import found_in
from tests.tiny import FOREIGN_WARNINGS, LORA, make_maker, model_settings, tokenizer, write_lm

pytestmark = FOREIGN_WARNINGS
ROOT = Path(__file__).parents[2]


def printed(checks: list[Check]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80).print(table_of(checks))
    return stream.getvalue()


def test_a_level_follows_from_what_was_found() -> None:
    assert checked("a", "b", "c") == Check("a", "b", "ok", "")
    assert checked("a", "b", "c", warning=True) == Check("a", "b", "warning", "c")
    assert checked("a", "b", "c", warning=True, fault=True) == Check("a", "b", "fault", "c")


def test_the_table_fits_and_shows_what_a_model_wrote_as_it_is() -> None:
    """Markup of rich and escapes of a terminal are text; passwords in addresses are not shown."""
    checks = [
        Check("sample 1", "[bold]the[/bold] \x1b[31mfilm " + "x" * 120),
        Check("gradient of the policy", "http://me:secret@host/", "fault", "mend it"),
    ]
    text = printed(checks)
    assert max(map(len, text.splitlines())) <= 80
    assert "[bold]the[/bold] \\x1b[31mfilm" in text
    assert "-> mend it" in text
    assert "secret" not in text
    assert summary(checks) == "0 warnings, 1 fault in 2 checks"


def test_weights_modes_gradients_and_state_are_left_as_they_were(tmp_path: Path) -> None:
    roles = build_roles(model_settings(write_lm(tmp_path), LORA), tokenizer(), seed=5)
    shaping = ScoreShaping(Normalize(), None, SetMissingEos(-1.0))  # has a state, as the adaptive KL coefficient has
    maker = make_maker(shaping=shaping, kl_controller=AdaptiveKL(0.1, kl_target=1.0, kl_horizon=10))
    before, state = [p.detach().clone() for p in roles.parameters()], repr(maker.state_dict())
    draws = torch.get_rng_state()
    found_in(roles, maker=maker)
    assert all(torch.equal(a, b) for a, b in zip(before, roles.parameters(), strict=True))
    assert all(p.grad is None for p in roles.parameters())
    assert repr(maker.state_dict()) == state
    assert torch.equal(draws, torch.get_rng_state())
    assert maker._drawn == 0  # the run's own first batch is compared with the engine too


@pytest.mark.slow
def test_the_command_ends_with_1_on_a_fault_and_names_it() -> None:
    environment = os.environ | {"COLUMNS": "80"}
    command = [sys.executable, "-m", "src.doctor", "ppo.clipp=0.1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "did you mean" in " ".join(done.stdout.split()) or "ppo.clipp" in done.stdout
    assert done.stderr == ""
