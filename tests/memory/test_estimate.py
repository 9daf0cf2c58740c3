"""The memory estimate against bytes that are really there, closed forms, and published sizes."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from benchmarks import memory_tables
from src.kernels import linear
from src.kernels.fast_layers import with_fast_layers
from src.memory.estimate import (
    ADAM_STATES,
    PREPACKED,
    SAVING,
    LiveBytes,
    Workload,
    _rollout,
    _scoring,
    _update,
    estimate,
)  # fmt: skip
from src.models.adapters import add_adapter
from src.models.loading import load_config
from src.models.vocab_head import ON_GPU
from tests.tiny import FOREIGN_WARNINGS, LORA, gpt2_config, make_roles, model_settings, write_lm

pytestmark = FOREIGN_WARNINGS
LOAD = Workload(rollout_rows=4, scoring_rows=3, update_rows=2, prompt_tokens=5, response_tokens=7)


def of(config, lora=LORA, load=LOAD, critic=True, **changes):
    return estimate(config, model_settings("x", lora, **{"fast_cpu": True} | changes), (), load, critic)


def held(parameters):
    return sum(p.numel() * p.element_size() for p in parameters)


@pytest.mark.parametrize("lora", [LORA, None])
def test_weights_and_gradients_are_those_of_the_roles(lora, tmp_path):
    path = write_lm(tmp_path / "lm")
    roles, said = make_roles(path, lora), of(load_config(path), lora)
    assert sum(said.weights.values()) == held(roles.parameters())
    assert said.gradients == {"policy": held(roles.policy_parameters()), "critic": held(roles.critic_parameters())}
    assert said.optimizer == {role: ADAM_STATES * taken for role, taken in said.gradients.items()}


def test_fake_and_real_tensors_take_the_same_bytes():
    lm = with_fast_layers(GPT2LMHeadModel(gpt2_config()).eval())
    add_adapter(lm, LORA, "policy")
    real = _update(lm, model_settings("x", fast_cpu=True), LOAD, 0)
    assert of(gpt2_config(), critic=False).phases["update of the policy: activations, gradients"] == real


def test_a_large_vocabulary_in_half_precision_takes_the_same_bytes():
    """Sampling, scoring and update of 262,144 words in bfloat16: what real tensors take, and what closed forms say."""
    words, width = 262_144, 8
    config = Gemma3TextConfig(
        vocab_size=words, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    said = of(config, critic=False, dtype="bfloat16", fast_cpu=False)
    lm = Gemma3ForCausalLM(config).bfloat16().eval()
    assert said.weights["base (is the reference)"] == held(lm.parameters())
    add_adapter(lm, LORA, "policy")
    settings = model_settings("x", dtype="bfloat16")
    real = {"rollout": _rollout(lm, LOAD), "scoring": _scoring(lm, LOAD), "update": _update(lm, settings, LOAD, 0)}
    found = {phase.split()[0].rstrip(":"): size for phase, size in said.phases.items() if phase != SAVING}
    assert found["rollout"] == real["rollout"]
    scores = LOAD.rollout_rows * words * 4  # of the next token, in float32
    assert 2 * scores <= real["rollout"] < 4 * scores
    for phase, rows in (("scoring", LOAD.scoring_rows), ("update", LOAD.update_rows)):
        # fakes count the pieces of the vocabulary that a GPU takes: 64 MiB at most, logits and what is made of them
        pieces = 3 * 4 * min(ON_GPU, rows * LOAD.response_tokens * words)
        assert real[phase] <= found[phase] <= real[phase] + pieces


def test_live_bytes_are_freed_with_the_last_view():
    with LiveBytes() as counter:
        a = torch.ones(1000)
        view = a[:10]
        b = a + 1
        assert (counter.live, counter.peak) == (8000, 8000)
        del a
        assert counter.live == 8000
        del view
        assert (counter.live, counter.peak) == (4000, 8000)
        b.add_(1)
    assert counter.peak == 8000


def test_the_cache_grows_with_rows_layers_and_tokens():
    """KV cache = 2 x layers x rows x tokens x width x 4 bytes; the difference of two."""
    name = "rollout: KV cache, next-token scores"
    config = gpt2_config(n_positions=4096)
    long, short = (of(config, load=Workload(4, 1, 1, 1, n)).phases[name] for n in (4001, 2001))
    cache = 2 * 2 * 4 * 2000 * 16 * 4
    assert cache <= long - short <= 1.6 * cache  # one of the two layers is there twice while it grows, and masks


def test_smaller_pieces_and_checkpointing_take_less():
    update = "update of the policy: activations, gradients"
    config = gpt2_config(n_layer=4)
    whole = of(config).phases[update]
    assert of(config, gradient_checkpointing=True).phases[update] < whole
    assert of(config, load=Workload(4, 3, 1, 5, 7)).phases[update] < whole


def test_without_a_critic_nothing_of_it_is_counted():
    said = of(gpt2_config(), critic=False)
    assert set(said.gradients) == {"policy"}
    assert not [phase for phase in said.phases if "critic" in phase]


def test_a_gpt2_has_the_published_number_of_parameters():
    said = of(GPT2Config(n_positions=1024), critic=False)
    assert said.weights["base (is the reference)"] == 124_439_808 * 4


@pytest.mark.slow
def test_the_page_says_what_the_code_says():
    assert memory_tables.PAGE.read_text(encoding="utf-8") == memory_tables.page()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", 2 * 4 * 2 * 768 * 4 * 768), ("bfloat16", 2 * 2 * (768 * 3 * 768 + 2 * 768 * 4 * 768))],
)
def test_prepacked_weights_are_those_of_large_frozen_layers_and_main_memory(
    dtype: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's two or three large layers of each block; none where every weight is trained, or where told so."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear, "bfloat16_is_native", lambda: True)
    config = GPT2Config(n_layer=2)
    said = of(config, dtype=dtype)
    assert said.weights[PREPACKED] == expected
    plain = of(config, dtype=dtype, prepack=False)
    assert PREPACKED not in plain.weights
    assert said.peak - plain.peak == expected
    assert said.on_gpu == plain.on_gpu
    assert PREPACKED not in of(config, lora=None).weights
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)
    assert (PREPACKED in of(config, dtype=dtype).weights) == (dtype == "bfloat16")


def test_without_the_fast_ways_nothing_is_prepacked_and_plain_layers_are_counted() -> None:
    """model.fast_cpu=false: the bytes of transformers' own layers."""
    lm = GPT2LMHeadModel(gpt2_config()).eval()
    add_adapter(lm, LORA, "policy")
    real = _update(lm, model_settings("x", fast_cpu=False), LOAD, 0)
    plain = of(gpt2_config(), critic=False, fast_cpu=False)
    assert plain.phases["update of the policy: activations, gradients"] == real
    assert PREPACKED not in of(GPT2Config(n_layer=2), fast_cpu=False).weights
