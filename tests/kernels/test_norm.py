"""The norm that is one kernel on a GPU; tests/gpu compares its numbers there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.kernels.norm import FusedLlamaNorm, FusedQwen2Norm
from src.models.loading import load_causal_lm
from tests.families import write_family
from tests.tiny import FOREIGN_WARNINGS, model_settings

pytestmark = FOREIGN_WARNINGS


@pytest.mark.parametrize(
    ("family", "kind"), [("llama-3.2-1b-instruct", FusedLlamaNorm), ("qwen2.5-0.5b-instruct", FusedQwen2Norm)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cpu_it_is_the_plain_norm_and_off_it_is_not_there(
    family: str, kind: type, dtype: str, tmp_path: Path
) -> None:
    """Bit for bit; two norms for each of two layers, and the last one."""
    folder = write_family(tmp_path, family)
    fast, plain = (load_causal_lm(model_settings(folder, dtype=dtype, fast_cpu=on)) for on in (True, False))
    assert sum(type(module) is kind for module in fast.modules()) == 5
    assert not any(isinstance(module, kind) for module in plain.modules())
    place = next(name for name, module in fast.named_modules() if type(module) is kind)
    norms = [lm.get_submodule(place) for lm in (fast, plain)]
    x = torch.randn(3, 7, fast.config.hidden_size).to(fast.dtype)
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.linspace(0.5, 2, fast.config.hidden_size))
        assert torch.equal(norms[0](x), norms[1](x))
