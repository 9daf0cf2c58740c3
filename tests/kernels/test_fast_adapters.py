"""The adapted layer against peft's own, in every state that peft knows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora as peft_lora
from torch import Tensor
from torch.testing import assert_close

from src.kernels import fast_adapters, linear
from src.kernels.fast_adapters import AdaptedLinear
from src.models.adapters import add_adapter, lora_config
from src.models.loading import load_causal_lm
from src.models.settings import LoraSettings
from src.utils.double_backward import twice_differentiable
from tests.models import architectures
from tests.tiny import FOREIGN_WARNINGS, model_settings

pytestmark = FOREIGN_WARNINGS
families = pytest.mark.parametrize("family", architectures.DECODERS)
IDS = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(0))


def adapted(path: Path, family: str, dropout: float = 0.0, **settings: Any) -> PeftModel:
    """A model with two adapters whose second matrices are not zero."""
    lm = load_causal_lm(model_settings(architectures.write(path, family), fast_cpu=True, **settings))
    lora = LoraSettings(rank=3, alpha=5, dropout=dropout, targets="all-linear")
    peft = add_adapter(lm, lora, "policy")
    peft.add_adapter("critic", lora_config(lora, lm))
    draws = torch.Generator().manual_seed(1)
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3, generator=draws)
    peft.set_adapter("policy")
    return peft


def plain(peft: PeftModel) -> PeftModel:
    """The same with peft's own layers."""
    own = copy.deepcopy(peft)
    for module in own.modules():
        if isinstance(module, AdaptedLinear):
            module.__class__ = peft_lora.Linear
    return own


def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The scaling of each call of the fast way."""
    calls: list[float] = []
    monkeypatch.setattr(fast_adapters, "low_rank", lambda *given: calls.append(given[-1]) or linear.low_rank(*given))
    return calls


def outcome(peft: PeftModel) -> list[Tensor]:
    logits = peft(IDS).logits
    trained = [weight for weight in peft.parameters() if weight.requires_grad and logits.requires_grad]
    return [logits.detach(), *(torch.autograd.grad(logits.float().tanh().sum(), trained) if trained else ())]


@families
@pytest.mark.parametrize("adapter", ["policy", "critic"])
def test_one_adapter_gives_the_numbers_and_gradients_of_peft(
    family: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = adapted(tmp_path, family, dtype="float64").double()
    peft.set_adapter(adapter)
    expected = outcome(plain(peft))
    calls = counted(monkeypatch)
    assert_close(outcome(peft), expected, atol=1e-10, rtol=1e-10)
    assert set(calls) == {5 / 3}


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_takes_it_too_and_rounds_as_finely(
    autocast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With autocast peft rounds the adapter's products too; on a base in half precision it does not."""
    peft = adapted(tmp_path, "gpt2", dtype="bfloat16")
    exact = outcome(plain(peft).double())
    found, scale = [], [x.abs().max() for x in exact]
    calls = counted(monkeypatch)
    for model in (peft, plain(peft)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rounded = zip(outcome(model), exact, scale, strict=True)
            found.append(sum((x.double() - y).abs().max() / s for x, y, s in rounded))
    assert len(calls) == sum(isinstance(module, AdaptedLinear) for module in peft.modules())
    assert found[0] < 1.2 * found[1]


def halve_adapters(peft: PeftModel) -> None:
    for name, weight in peft.named_parameters():
        if "lora" in name:
            weight.data = weight.data.bfloat16()


STATES: dict[str, Callable[[PeftModel], object]] = {
    "disabled": lambda peft: peft.base_model.disable_adapter_layers(),
    "merged": lambda peft: peft.merge_adapter(),
    "two": lambda peft: peft.base_model.set_adapter(["policy", "critic"]),
    "dropout": lambda peft: peft.train(),
    "less precise than the base": halve_adapters,
}


@pytest.mark.parametrize("state", STATES)
def test_every_other_state_is_left_to_peft(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters switched off, merged, two at a time, with dropout in training, less precise than the base."""
    peft = adapted(tmp_path, "gpt2", dropout=0.5)
    STATES[state](peft)
    calls = counted(monkeypatch)
    found = []
    for model in (peft, plain(peft)):
        torch.manual_seed(0)
        found.append(outcome(model))
    assert calls == []
    assert_close(found[0], found[1], atol=0, rtol=0)


def test_dropout_is_no_hindrance_outside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = adapted(tmp_path, "gpt2", dropout=0.5).double().eval()
    calls = counted(monkeypatch)
    assert_close(outcome(peft), outcome(plain(peft)), atol=1e-10, rtol=1e-10)
    assert calls != []


def test_second_derivatives_are_those_of_peft(tmp_path: Path) -> None:
    """As the Fisher-vector products of TRPO need."""
    found = []
    peft = adapted(tmp_path, "gpt2", dtype="float64").double()
    for model in (peft, plain(peft)):
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        with twice_differentiable():
            first = torch.autograd.grad(model(IDS).logits.tanh().sum(), trained, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained))
    assert_close(found[0], found[1], atol=1e-10, rtol=1e-10)
