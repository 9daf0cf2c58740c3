"""A base in 4 or 8 bits: its values, its gradients, the roles on it, and the plain models that are made from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from src.errors import ModelError
from src.memory.estimate import Workload, estimate
from src.models.fingerprint import base_fingerprint
from src.models.loading import load_causal_lm, load_config
from src.models.quantized import quantize, quantized_as
from src.models.quantized_linear import QuantizedLinear
from tests.models import architectures
from tests.tiny import FOREIGN_WARNINGS, LORA, make_roles, model_settings, ragged_rollout, write_lm

pytest.importorskip("bitsandbytes", reason="the extra `quantize` is not installed (make real-check)")

pytestmark = FOREIGN_WARNINGS
BITS = ("nf4", "int8")
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
# of NF4, https://arxiv.org/abs/2305.14314, appendix E
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


def layer(dtype=torch.float32, outputs=48, inputs=80):
    linear = torch.nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
    torch.nn.init.normal_(linear.weight, std=0.05)
    return linear


def nearest_nf4(weight):
    """Each block of 64 over its largest size, and of the 16 values the nearest."""
    blocks = weight.flatten().split(64)
    scales = [block.abs().max() for block in blocks]
    index = [((block / scale)[:, None] - NF4).abs().argmin(-1) for block, scale in zip(blocks, scales, strict=True)]
    return torch.cat([NF4[i] * scale for i, scale in zip(index, scales, strict=True)]).view_as(weight)


def nearest_int8(weight):
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round() * scales


@pytest.mark.parametrize(("how", "reference"), [("nf4", nearest_nf4), ("int8", nearest_int8)])
@pytest.mark.parametrize("shape", [(48, 80), (64, 128), (3, 37), (5, 16)])
def test_the_weights_are_those_of_the_definition(how, reference, shape):
    """Also where a row is no whole number of blocks, in which bitsandbytes 0.50.2 mixes up the scales of NF4."""
    plain = layer(outputs=shape[0], inputs=shape[1])
    assert_close(QuantizedLinear(plain, how).dequantized(), reference(plain.weight), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("how", "low", "high"), [("nf4", 0.08, 0.10), ("int8", 0.004, 0.012)])
def test_normal_weights_lose_what_the_page_says(how, low, high):
    plain = layer(outputs=256, inputs=512)
    error = (QuantizedLinear(plain, how).dequantized() - plain.weight).norm() / plain.weight.norm()
    assert low < error < high


@pytest.mark.parametrize("how", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_dequantized_layer(how, dtype):
    small = QuantizedLinear(layer(dtype), how)
    same, x, above = small.plain(dtype), torch.randn(2, 3, 80, dtype=dtype), torch.randn(2, 3, 48, dtype=dtype)
    found = []
    for module in (small, same):
        inputs = x.clone().requires_grad_(True)
        (result := module(inputs)).backward(above)
        found.append((result, inputs.grad))
    assert_close(*found, atol=0, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_product_can_be_differentiated_twice():
    """As policy_loss=trpo does: d/dx of |d/dx sum tanh(W x)|^2, against the plain layer's."""
    small = QuantizedLinear(layer(), "nf4")
    found = []
    for module in (small, small.plain(torch.float32)):
        x = torch.linspace(-1, 1, 160).view(2, 80).requires_grad_(True)
        (first,) = torch.autograd.grad(torch.tanh(module(x)).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert found[0].abs().max() > 1e-4
    assert_close(*found)


def test_autograd_keeps_no_dequantized_weight():
    """Of the layers between the adapters, or a base in 4 bits would take as much memory as one in 32."""
    small, kept = QuantizedLinear(layer(outputs=512, inputs=512), "nf4"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        small(torch.randn(1, 512, requires_grad=True)).sum().backward()
    assert not [size for size in kept if size >= 512 * 512]


def test_quantizing_a_merged_update_again_loses_it():
    """Why the SFT stage trains plain weights: on the steps of NF4 a small update falls back onto them.

    Measured is which part of the update U is left, <Q(W + U) - Q(W), U> / |U|^2.
    """
    plain = layer(outputs=256, inputs=512)
    update = torch.randn_like(plain.weight) * 0.01 * plain.weight.std()

    def left(weight):
        plain.weight.data = weight
        before = QuantizedLinear(plain, "nf4").dequantized()
        plain.weight.data = weight + update
        change = QuantizedLinear(plain, "nf4").dequantized() - before
        return (change * update).sum() / update.square().sum()

    weight = plain.weight.data.clone()
    assert left(weight) == pytest.approx(1, abs=0.2)
    plain.weight.data = weight
    assert left(QuantizedLinear(plain, "nf4").dequantized()) < 0.1


@pytest.mark.parametrize("how", BITS)
@pytest.mark.parametrize("family", architectures.DECODERS)
def test_the_roles_on_it_and_what_is_made_of_them(family, how, tmp_path):
    """The merged policy, and the folder of its adapter read again, give the logits of base and adapter."""
    roles = make_roles(architectures.write(tmp_path / "lm", family), spread=0.2, quantize=how)
    with torch.no_grad(), roles.acting("policy") as lm:
        expected = lm(input_ids=IDS).logits
    with torch.no_grad(), roles.acting("reference") as lm:
        assert (lm(input_ids=IDS).logits - expected).abs().max() > 0.05
    policy = roles.merged_policy()
    assert (quantized_as(roles), quantized_as(policy)) == (how, None)
    policy.save_pretrained(tmp_path / "model")
    assert roles.save_adapter(tmp_path / "adapter")
    roles.tokenizer.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        for path in ("model", "adapter"):
            found = load_causal_lm(model_settings(str(tmp_path / path)))(input_ids=IDS).logits
            assert_close(found, expected, atol=2e-5, rtol=0)


def test_what_is_quantized(tmp_path):
    """The linear layers of the backbone; not its embedding, its norms or the head, which keep their type."""
    path = architectures.write(tmp_path, "llama")
    lm = load_causal_lm(model_settings(path, dtype="bfloat16", quantize="nf4"))
    small = {name for name, module in lm.named_modules() if isinstance(module, QuantizedLinear)}
    linear = {n for n, m in load_causal_lm(model_settings(path)).named_modules() if isinstance(m, torch.nn.Linear)}
    assert small == linear - {"lm_head"}
    assert len(small) == 14
    others = {n: p.dtype for n, p in lm.named_parameters() if n.rpartition(".")[0] not in small}
    assert set(others.values()) == {torch.bfloat16}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(others)


def test_nothing_holds_the_file_that_was_read(tmp_path):
    """One view into its mapping, as of the embedding, would keep the plain weights in memory; tied ones stay one."""
    lm = load_causal_lm(model_settings(write_lm(tmp_path)))
    read = [parameter.data for parameter in lm.parameters()]
    quantize(lm, "nf4")
    assert {x.data_ptr() for x in read}.isdisjoint(p.data_ptr() for p in lm.parameters())
    assert lm.lm_head.weight is lm.transformer.wte.weight


def test_a_model_without_plain_linear_layers_is_refused(tmp_path):
    lm = load_causal_lm(model_settings(write_lm(tmp_path)))
    for block in lm.transformer.h:
        block.attn, block.mlp = torch.nn.Identity(), torch.nn.Identity()
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no plain linear layers"):
        quantize(lm, "nf4")


def test_it_is_what_transformers_makes_of_the_folder(tmp_path):
    """So an exported adapter serves on a base that others load in NF4."""
    path = architectures.write(tmp_path, "llama")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(path, quantization_config=settings, dtype=torch.float32)
    ours = load_causal_lm(model_settings(path, quantize="nf4"))
    for name, small in [(n, m) for n, m in ours.named_modules() if isinstance(m, QuantizedLinear)]:
        weight = theirs.get_submodule(name).weight
        assert torch.equal(weight.data, small.weight)
        assert torch.equal(weight.quant_state.absmax, small.scales)


def test_other_bits_are_another_base(tmp_path):
    """Weights and scales count, before and after there are adapters on them."""
    path = write_lm(tmp_path)
    prints = [base_fingerprint(load_causal_lm(model_settings(path, quantize=how)).base_model) for how in (None, *BITS)]
    assert len(set(prints)) == 3
    roles = make_roles(path, quantize="nf4")
    assert base_fingerprint(roles.peft.get_base_model().base_model) == prints[1]
    with torch.no_grad():
        next(p for name, p in roles.named_parameters() if name.endswith("scales")).mul_(1.5)
    assert base_fingerprint(roles.peft.get_base_model().base_model) != prints[1]


def test_values_gradients_and_kept_trunks_are_those_of_the_merged_base(tmp_path):
    """All roles at once on an NF4 base, against the same roles on a plain base with the dequantized weights."""
    lora = replace(LORA, layers=1)
    few = make_roles(write_lm(tmp_path / "lm"), lora, spread=0.2, quantize="nf4")
    base = load_causal_lm(model_settings(str(tmp_path / "lm"), quantize="nf4"))
    for name, module in [(n, m) for n, m in base.named_modules() if isinstance(m, QuantizedLinear)]:
        parent, _, own = name.rpartition(".")
        setattr(base.get_submodule(parent), own, module.plain(torch.float32))
    base.save_pretrained(tmp_path / "plain")
    plain, rollout = make_roles(str(tmp_path / "plain"), lora, spread=0.2), ragged_rollout()
    assert few.shares_trunk
    for rows in (rollout, replace(rollout, trunk=few.trunk(rollout))):
        results = []
        for roles in (few, plain):
            roles.zero_grad()
            logprobs, values = roles.distribution(rows, 1.0).logprobs(), roles.values(rows)
            (logprobs.sum() + values.sum()).backward()
            grads = [p.grad for p in [*roles.policy_parameters(), *roles.critic_parameters()]]
            results.append([logprobs, values, *grads])
        assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", BITS)
def test_the_estimate_counts_the_bytes_that_are_there(how, tmp_path):
    path = write_lm(tmp_path)
    roles = make_roles(path, quantize=how)
    load = Workload(rollout_rows=4, scoring_rows=3, update_rows=2, prompt_tokens=5, response_tokens=7)
    found = estimate(load_config(path), model_settings(path, quantize=how), (), load, True)
    assert sum(found.weights.values()) == sum(p.numel() * p.element_size() for p in roles.parameters())
    plain = estimate(load_config(path), model_settings(path), (), load, True)
    assert found.lasting < plain.lasting
    assert found.on_gpu < plain.on_gpu
