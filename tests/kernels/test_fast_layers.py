"""A model whose layers use the faster product gives what it gave, is saved as it was and takes adapters."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import NewGELUActivation

from src.kernels import fast_layers as layers
from src.kernels import linear, padding_free
from src.kernels.fast_layers import FusedGELU, Linear, TransposedLinear, with_fast_layers
from src.models.loading import load_causal_lm
from src.rollout.sampling import Sampler
from tests.models import architectures
from tests.tiny import EOS, FOREIGN_WARNINGS, PAD, make_roles, model_settings, ragged_rollout

pytestmark = FOREIGN_WARNINGS
families = pytest.mark.parametrize("family", architectures.DECODERS)


def test_the_activation_is_the_same_function() -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    assert_close(FusedGELU()(x), NewGELUActivation()(x), atol=1e-12, rtol=0)


@families
def test_logits_and_saved_weights_stay(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_causal_lm(model_settings(architectures.write(tmp_path / "model", family)))
    monkeypatch.setattr(layers, "LARGE", 1)
    fast = with_fast_layers(copy.deepcopy(plain))
    assert any(isinstance(module, Linear | TransposedLinear) for module in fast.modules())
    assert not any(isinstance(module, Linear | TransposedLinear) for module in plain.modules())
    ids = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    assert_close(fast(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    fast.save_pretrained(tmp_path / "saved")
    again = load_causal_lm(model_settings(str(tmp_path / "saved")))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))


@families
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_gradients_of_the_roles_stay(family: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rollout = architectures.write(tmp_path, family), ragged_rollout()
    found = []
    for large in (2**62, 1):
        monkeypatch.setattr(layers, "LARGE", large)
        roles = make_roles(path, spread=0.1) if lora else make_roles(path, None, spread=0.1)
        (roles.distribution(rollout, 1.0).logprobs().sum() + roles.values(rollout).sum()).backward()
        found.append([p.grad for p in [*roles.policy_parameters(), *roles.critic_parameters()] if p.grad is not None])
    scale = max(g.abs().max() for g in found[0])
    assert_close([g / scale for g in found[1]], [g / scale for g in found[0]], atol=1e-5, rtol=1e-4)


def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "LARGE", 1)
    monkeypatch.setattr(layers, "WORTH_A_COPY", {torch.float32: 1, torch.bfloat16: 1})
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prepacked_roles_give_the_same_numbers_and_gradients(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_are_large(monkeypatch)
    path, rollout, found = architectures.write(tmp_path, family), ragged_rollout(), []
    for prepack in (False, True):
        roles = make_roles(path, spread=0.1, dtype=dtype, prepack=prepack)
        logprobs, values = roles.distribution(rollout, 1.0).logprobs(), roles.values(rollout)
        (logprobs.sum() + values.sum()).backward()
        gradients = [p.grad for p in [*roles.policy_parameters(), *roles.critic_parameters()] if p.grad is not None]
        packed = [layer.packed for layer in layers.layers_to_pack(roles.peft.get_base_model().base_model)]
        assert len(packed) >= 8 or not layers.by_onednn(getattr(torch, dtype))
        assert all((p is not None and p._packed is not None) == prepack for p in packed)
        found.append([logprobs.detach(), values.detach(), *gradients])
    scale = [x.abs().max() for x in found[0]]
    tolerance = 1e-5 if dtype == "float32" else 0.1
    assert_close(*([x / s for x, s in zip(xs, scale, strict=True)] for xs in found[::-1]), atol=tolerance, rtol=0)


class Products(TorchDispatchMode):
    """Counts the matrix products of each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in ("mm", "linear", "attention", "matmul")):
            self.counts[next(x.dtype for x in args if isinstance(x, torch.Tensor))] += 1
        return function(*args, **(kwargs or {}))


@families
def test_without_units_for_bfloat16_no_product_is_made_in_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring, training and sampling of a model in bfloat16, as on a processor with neither AVX-512 nor its like."""
    all_are_large(monkeypatch)
    for module in (linear, padding_free, layers):
        monkeypatch.setattr(module, "bfloat16_is_native", lambda: False)
    roles, rollout = make_roles(architectures.write(tmp_path, family), dtype="bfloat16"), ragged_rollout()
    with Products() as products:
        (roles.distribution(rollout, 1.0).logprobs().sum() + roles.values(rollout).sum()).backward()
        with roles.acting("policy") as lm:
            Sampler(4).sample(lm, rollout.prompt_ids, rollout.prompt_mask, torch.tensor([EOS]), PAD, None)
    assert products.counts[torch.float32] > 100
    assert products.counts[torch.bfloat16] == 0


def packed_layer() -> Linear:
    layer = torch.nn.Linear(5, 4).requires_grad_(False)
    layer.__class__ = Linear
    layer.packed = layers.Packed()
    return layer  # type: ignore[return-value]


def test_a_weight_that_changes_is_packed_anew() -> None:
    """In place, as a whole, in precision; and one that comes to be trained is read as it is."""
    layer, x = packed_layer(), torch.linspace(-1, 1, 10).view(2, 5)
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: setattr(layer, "weight", torch.nn.Parameter(torch.ones(4, 5), requires_grad=False)),
        lambda: layer.weight.copy_(torch.eye(4, 5)),
        lambda: layer.weight.requires_grad_(True),
    ):
        layer(x)
        change()
        assert_close(layer(x), x @ layer.weight.t() + layer.bias, atol=1e-6, rtol=0)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert_close(layer.double()(x.double()), x.double() @ layer.weight.t() + layer.bias)


def test_a_copy_has_no_packed_weight() -> None:
    """peft merges into `.data`, which tells nobody that the weight is another."""
    layer, x = packed_layer(), torch.ones(1, 5)
    layer(x)
    copied = copy.deepcopy(layer)
    copied.weight.data += 1
    assert_close(copied(x), layer(x) + 5, atol=1e-5, rtol=0)


def test_a_merged_policy_of_prepacked_roles_is_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checklist 65. After the base has been used, and so packed."""
    all_are_large(monkeypatch)
    roles, ids = make_roles(architectures.write(tmp_path, "gpt2"), spread=0.3), torch.arange(4, 13).unsqueeze(0)
    with torch.no_grad():
        with roles.acting("reference") as lm:
            reference = lm(ids).logits
        with roles.acting("policy") as lm:
            policy = lm(ids).logits
        merged = roles.merged_policy()(ids).logits
    assert (policy - reference).abs().max() > 0.1
    assert_close(merged, policy, atol=1e-4, rtol=0)
