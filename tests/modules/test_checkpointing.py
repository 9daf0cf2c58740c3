"""model.gradient_checkpointing is heard wherever a language model is trained, and changes no gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import get_constant_schedule

from src.models.forward import next_token_logprobs
from src.models.reward_choices import SharedBaseAdapter
from src.modules.sft import SFTModule
from tests.tiny import FOREIGN_WARNINGS, LORA, TinyCorpus, make_roles, model_settings, seeded, tokenizer, write_lm

pytestmark = FOREIGN_WARNINGS

IDS = torch.randint(3, 20, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 7, dtype=torch.bool)
Made = tuple[nn.Module, Callable[[], Tensor]]


def sft(path: str, checkpointing: bool) -> Made:
    model = model_settings(path, gradient_checkpointing=checkpointing)
    module = SFTModule(
        model, LORA, tokenizer(), optimizer=partial(torch.optim.SGD, lr=0.0), lr_schedule=get_constant_schedule,
        max_grad_norm=1.0, seed=1,
    )  # fmt: skip
    return module, lambda: module._logprobs({"ids": IDS, "mask": MASK, "counted": MASK}, torch.arange(3)).sum()


def reward(path: str, checkpointing: bool) -> Made:
    choice = SharedBaseAdapter(model_settings(path, gradient_checkpointing=checkpointing), LORA)
    net = choice.build(choice.build_tokenizer(TinyCorpus()), 1, True)
    return net, lambda: net.scores(IDS, MASK).sum() + net.scores_and_logprobs(IDS, MASK, MASK)[1].sum()


def third_loss(path: str, checkpointing: bool) -> Made:
    roles = seeded(lambda: make_roles(path, spread=0.1, gradient_checkpointing=checkpointing), 0)

    def loss() -> Tensor:
        with roles.acting("policy") as lm:
            return next_token_logprobs(lm, IDS, MASK, checkpointing=roles.checkpointing).sum()

    return roles, loss


@pytest.mark.parametrize(("make", "passes"), [(sft, 1), (reward, 2), (third_loss, 1)])
def test_each_layer_is_recomputed_and_gradients_stay(
    make: Callable[[str, bool], Made], passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers, one call for each of them and each pass; the mode of every module is as before."""
    calls: list[int] = []
    plain = transformers.modeling_utils.checkpoint
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    path, found = write_lm(tmp_path / "base"), []
    for checkpointing in (False, True):
        module, loss = make(path, checkpointing)
        modes = [m.training for m in module.modules()]
        loss().backward()
        assert [m.training for m in module.modules()] == modes
        found.append([p.grad for p in module.parameters() if p.grad is not None])
        assert len(calls) == (2 * passes if checkpointing else 0)
    assert found[0]
    assert_close(found[1], found[0], atol=1e-6, rtol=0)
