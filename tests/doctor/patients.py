"""A small sound run in Python, of which one part can be another, and what the doctor finds in it."""

from __future__ import annotations

from typing import Any

from src.callbacks.rollout import RolloutCallback
from src.data.modules import PromptData
from src.doctor.examine import examine
from src.models.roles import Roles
from src.utils.check import Check
from tests.tiny import TinyCorpus, make_maker, make_module


def found_in(roles: Roles, *, maker: Any = None, data: dict[str, Any] | None = None, **changes: Any) -> list[Check]:
    """The checks of these roles; `data` are changes of its prompts, `changes` those of the module."""
    settings: dict[str, Any] = {"batch_size": 8, "max_prompt_tokens": 8, "iterations": 2}
    settings |= {"corpus": TinyCorpus(), "tokenizer": roles.tokenizer} | (data or {})
    return examine(make_module(roles, **changes), PromptData(**settings), RolloutCallback(maker or make_maker()))


def faults(checks: list[Check]) -> dict[str, str]:
    """What is found at fault, by the check's name."""
    return {check.name: check.found for check in checks if check.level == "fault"}
