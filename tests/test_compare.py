"""The operations that `benchmarks.compare` counts by formula, against torch's own counter on the real modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.compare.contenders import CONTENDERS
from benchmarks.compare.limit import Pass, decoded_bytes, flops
from benchmarks.compare.page import row
from benchmarks.compare.workload import VOCABULARY, Workload, on_gpu
from tests.tiny import CONV1D

TOKENS, RESPONSE = 11, 4
ONE_ROW = Workload(2, 64, rows=1, new_tokens=RESPONSE, rank=3)
pytestmark = pytest.mark.filterwarnings(CONV1D)


def counted(lora: bool, learns: bool) -> int:
    """Operations of a pass over one text, with the head at its response."""
    shape = {"n_layer": ONE_ROW.layers, "n_head": ONE_ROW.heads, "n_embd": ONE_ROW.width, "vocab_size": VOCABULARY}
    lm: Any = GPT2LMHeadModel(GPT2Config(**shape, attn_implementation="eager")).eval()
    if lora:
        adapter = LoraConfig(r=ONE_ROW.rank, target_modules=["c_attn"], task_type="CAUSAL_LM")
        lm = get_peft_model(lm, adapter).get_base_model().eval()
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learns):
        hidden = lm.transformer(torch.arange(TOKENS).unsqueeze(0)).last_hidden_state
        logits = lm.lm_head(hidden[:, -RESPONSE - 1 : -1])
        if learns:
            logits.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("lora", [True, False])
def test_a_pass_takes_the_operations_that_torch_counts(lora: bool) -> None:
    """torch counts attention to all N^2 pairs of places, the formula to the N (N + 1) / 2 that a causal mask leaves."""
    one = Pass(ONE_ROW, [TOKENS])
    beyond = ONE_ROW.layers * 4 * ONE_ROW.width * TOKENS * (TOKENS - 1) // 2
    assert one.forward(ONE_ROW.layers, lora=lora, head=True) + beyond == counted(lora, learns=False)
    assert one.learn(ONE_ROW.layers, lora=lora, head=True) + 3 * beyond == counted(lora, learns=True)


def test_every_contender_is_counted_for_what_it_does() -> None:
    """TRL does not score with the policy; a trunk is computed once, and only what is above it learns."""
    workload = Workload(12, 768)
    by_name = {contender.name: flops(contender, workload) for contender in CONTENDERS}
    assert "policy" not in by_name["trl_lora"]["score"]
    assert by_name["trl_lora"]["train"]["critic"] == by_name["ours_full"]["train"]["critic"]
    assert by_name["trl_lora"]["train"]["policy"] == by_name["ours_lora"]["train"]["policy"]
    score, whole = by_name["ours_top_bf16"]["score"], by_name["ours_lora"]["score"]
    assert score["trunk"] == whole["reward"] * 8 / 12
    assert whole["reference"] - score["reference"] == score["trunk"]
    assert by_name["ours_adapter_reward"]["score"]["reward"] > whole["reward"]
    assert by_name["trl_both"]["train"] == by_name["ours_lora"]["train"]
    assert by_name["trl_lora_bf16"] == by_name["trl_lora"]
    critic, both = by_name["ours_critic_top"], by_name["ours_top_bf16"]
    for phase in ("score", "train"):
        assert critic[phase]["critic"] == both[phase]["critic"] < by_name["ours_lora"][phase]["critic"]
        assert critic[phase]["policy"] == by_name["ours_lora"][phase]["policy"]


def test_decoding_reads_all_matrices_and_the_cache_for_each_token() -> None:
    """Counted on a real model and its real cache; the first token comes of the pass over the prompts."""
    workload = Workload(2, 64, rows=2, shortest=3, longest=5, new_tokens=3)
    shape = {"n_layer": workload.layers, "n_head": workload.heads, "n_embd": workload.width}
    lm = GPT2LMHeadModel(GPT2Config(**shape, vocab_size=VOCABULARY)).eval()
    matrices = [p for name, p in lm.named_parameters() if p.dim() == 2 and "wpe" not in name]
    read = 0
    for token in range(1, workload.new_tokens):
        read += sum(p.nbytes for p in matrices)
        for prompt in workload.prompt_lengths:
            cache = lm(torch.zeros(1, prompt + token, dtype=torch.long)).past_key_values
            read += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    by_name = {contender.name: contender for contender in CONTENDERS}
    assert decoded_bytes(by_name["ours_lora"], workload) == read
    assert decoded_bytes(by_name["ours_lora_bf16"], workload) == read / 2


def test_a_gpus_prompts_and_responses_fit_into_the_positions() -> None:
    """Of GPT-2, 1024."""
    workload = on_gpu(12, 768)
    assert max(workload.prompt_lengths) + workload.new_tokens <= GPT2Config().n_positions
    assert workload.rows % workload.minibatch == 0


def test_prompts_are_as_long_as_the_workload_says() -> None:
    lengths = Workload(12, 768).prompt_lengths
    assert (len(lengths), lengths[0], lengths[-1]) == (16, 16, 47)


def test_each_iteration_is_held_against_the_rates_beside_it() -> None:
    """A machine that is twice as slow in one round, in its products too, is as near to its limit in each."""
    workload, contender = Workload(12, 768), CONTENDERS[2]
    operations = {phase: sum(roles.values()) for phase, roles in flops(contender, workload).items()}
    iterations = []
    for slow in (1, 2, 1.5):
        seconds = {phase: 3 * slow * n / 1e9 for phase, n in operations.items()}
        rates = {"float32": 1e9 / slow, "bfloat16": 7e9, "bandwidth": decoded_bytes(contender, workload) / slow}
        iterations.append({"cpu": seconds, "wall": seconds, "peak_gib": slow, "rates": rates})
    found = row(contender, iterations, workload)
    assert found["ratio_to_limit"] == pytest.approx(3)
    assert found["phase_ratio_to_limit"] == pytest.approx(dict.fromkeys(operations, 3))
    assert found["train_rate_share"] == pytest.approx(1 / 3)
    assert found["decode_bandwidth_share"] == pytest.approx(1e9 / 3 / operations["rollout"])
    assert (found["seconds"], found["peak_gib"]) == (pytest.approx(4.5e-9 * sum(operations.values())), 1.5)
