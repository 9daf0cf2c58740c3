"""Five sound configurations pass without a fault, from overrides, and nothing is written for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.doctor.diagnose import diagnose
from src.runs.start import start
from src.utils.check import Check
from tests.chats import write_chat_lm
from tests.conftest import TINY_RUN
from tests.doctor.patients import faults
from tests.tiny import FOREIGN_WARNINGS, write_lm

pytestmark = FOREIGN_WARNINGS


def levels(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.level for check in checks}


def sound(*overrides: str) -> list[Check]:
    """The checks of a run in which nothing is at fault, down to the last gradient."""
    checks = list(diagnose([*overrides]))
    assert faults(checks) == {}
    assert "gradient of the policy" in levels(checks)
    return checks


def test_full_fine_tuning(tmp_path: Path) -> None:
    checks = sound(*TINY_RUN, "model.lora=null", f"model.path={write_lm(tmp_path / 'lm')}", f"log_dir={tmp_path}/logs")
    assert levels(checks)["gradient of the critic"] == "ok"
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_processor_without_units_for_bfloat16_is_named(
    dtype: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.doctor.diagnose.bfloat16_is_native", lambda: native)
    given = [*TINY_RUN, f"model.dtype={dtype}", f"model.path={write_lm(tmp_path / 'lm')}", "trainer.accelerator=cpu"]
    device = next(check.found for check in diagnose(given) if check.name == "device")
    assert f"model.dtype={dtype}" in device
    assert ("no units" in device) == (dtype == "bfloat16" and not native)


def test_groups_without_a_critic(tmp_path: Path) -> None:
    own = ["advantage=group_relative", "rollout.samples_per_prompt=4", f"model.path={write_lm(tmp_path / 'lm')}"]
    found = levels(sound(*TINY_RUN, *own, f"log_dir={tmp_path}/logs"))
    assert found["groups"] == "ok"
    assert not {"gradient of the critic", "returns"} & set(found)
    assert not (tmp_path / "logs").exists()


def test_a_chat_tuned_model(tmp_path: Path) -> None:
    lm, rows = write_chat_lm(tmp_path / "lm"), tmp_path / "rows.jsonl"
    texts = ["the film was long", "a bad film", "we liked the plot", "the cast was great"] * 5
    rows.write_text("\n".join(json.dumps({"prompt": f"{text} {i}"}) for i, text in enumerate(texts)))
    own = ["data=custom", f"data.path={rows}", "data.columns.prompt=prompt", "data.chat=true", f"model.path={lm}"]
    small = [o for o in TINY_RUN if not o.startswith(("data.", "rollout.max_prompt"))]
    checks = sound(*small, *own, "rollout.max_prompt_tokens=30", f"log_dir={tmp_path}/logs")
    (ends,) = [check for check in checks if check.name == "end tokens"]
    assert ends.found == "'<eos>', '<turn|>' end a response; 8 of 8 prompts open an answer in a chat"


@pytest.mark.slow
def test_arithmetic(tmp_path: Path) -> None:
    """Nothing is trained yet: new weights stand in for the SFT model, and that is said."""
    found = levels(
        sound("experiment=arithmetic", "ppo.batch_size=64", "ppo.minibatch_size=64", f"log_dir={tmp_path}/a")
    )
    assert found["models"] == "warning"
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_embedded_sentiment(tmp_path: Path) -> None:
    """Before anything is trained, and with the SFT and reward model that a run has trained."""
    own = ["experiment=quick", f"log_dir={tmp_path}/logs", "trainer.accelerator=cpu"]
    before = levels(sound(*own))
    assert (before["models"], before["reward model"]) == ("warning", "warning")
    assert not (tmp_path / "logs").exists()
    start([*own, "ppo.num_iterations=1"])
    kept = sorted(path for path in (tmp_path / "logs").rglob("*"))
    after = {check.name: check for check in sound(*own)}
    assert after["models"].level == "ok"
    assert "held-out pairs" in after["reward model"].found
    assert sorted(path for path in (tmp_path / "logs").rglob("*")) == kept
