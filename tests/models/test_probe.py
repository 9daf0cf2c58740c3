"""Models that PPO cannot train are refused by name when they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.errors import ModelError
from tests.matrix.architectures import write
from tests.tiny import FOREIGN_WARNINGS, make_roles

pytestmark = FOREIGN_WARNINGS


@pytest.mark.parametrize(
    ("name", "why"),
    {
        "bert": "BertLMHeadModel lets a token see those after it",
        "openai-gpt": "OpenAIGPTLMHeadModel keeps no past between tokens",
        "minimax": "MiniMaxForCausalLM keeps the past in a MiniMaxCache",
        "modernbert-decoder": "ModernBertDecoderForCausalLM changes its logits after the head",
    }.items(),
)
def test_what_cannot_be_trained_is_refused_by_name(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        make_roles(write(tmp_path, name))
