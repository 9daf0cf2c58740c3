"""How a run was asked for: its command, and what differs from the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from src.config.compose import NOT_SETTINGS, compose
from src.config.files import leaves
from src.errors import UserError
from src.report.read import RunData

ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """A key whose value is not the default."""

    key: str
    here: str
    default: str


def command(run: RunData) -> str:
    """The command that the run was started with."""
    overrides = [str(override) for override in run.config.get("overrides") or []]
    return " ".join(["python -m src.train", *([] if run.stage == "ppo" else [f"stage={run.stage}"]), *overrides])


def differences(run: RunData) -> list[Difference] | None:
    """Every key that is not as in `python -m src.train stage=STAGE`; None where that cannot be told."""
    try:
        default = compose([f"stage={run.stage}"]).plain()
    except UserError:
        return None
    return compared({"here": run.config, "default": default})


def compared(configs: dict[str, dict[str, Any]]) -> list[Difference]:
    """The keys in which `here` and `default` differ."""
    here, default = (flat(configs[name]) for name in ("here", "default"))
    keys = [*here, *(key for key in default if key not in here)]
    values = [(key, here.get(key, ABSENT), default.get(key, ABSENT)) for key in keys]
    return [Difference(*row) for row in values if row[1] != row[2]]


def _options(config: dict[str, Any]) -> dict[str, Any]:
    chosen = config.get("choices")
    return chosen if isinstance(chosen, dict) else {}


def flat(config: dict[str, Any]) -> dict[str, str]:
    """Dotted key -> value in YAML, without what names a run and without classes, which the choices name."""
    plain = {key: value for key, value in config.items() if key not in (*NOT_SETTINGS, "choices")}
    return {key: str(value) for key, value in _options(config).items()} | {
        key: yaml.safe_dump(value, default_flow_style=True).replace("\n...\n", "").strip()
        for key, value in leaves(plain)
        if not key.endswith(("_target_", "_partial_"))
    }
