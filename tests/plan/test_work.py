"""The counted work against operations that PyTorch counts, closed forms and invariances. No time is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from src.models.adapters import add_adapter
from src.plan.iteration import OPTIMIZER, ROLLOUT, SCORING, SYNCHRONIZATION, TRAINING, Ranks, Roles, Sizes, iteration
from src.plan.read import shape_of
from src.plan.work import KINDS, Rows, Shape, decode, forward, learn
from tests.tiny import FOREIGN_WARNINGS, LORA, gpt2_config

pytestmark = FOREIGN_WARNINGS
LLAMA = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
KINDS_OF_MODEL = {"gpt2": (gpt2_config, GPT2LMHeadModel), "llama": (lambda: LLAMA, LlamaForCausalLM)}
ROWS, TOKENS = 3, 8
BATCH = Rows(ROWS, TOKENS, TOKENS)  # the head reads every token
SHAPE = Shape(4, 32, {(32, 64): 2, (64, 32): 1}, {(32, 64): 2}, 32, 16, 100, 4, rank=2)
ROLES = Roles(
    policy=SHAPE, base=5e4, gradients={"policy": 4e3, "critic": 2e3}, rewards=[SHAPE], policy_layers=4, critic_layers=4,
    reference=True,
)  # fmt: skip
SIZES = Sizes(rows=16, samples=1, prompt=10, response=6, epochs=2, minibatch=8, micro=4, scoring=8)
CRITIC, POLICY = (TRAINING, "critic"), (TRAINING, "policy")


def counted(model, train):
    """Operations of products that PyTorch counts; attention is counted apart, and by the full square."""
    embedded = torch.randn(ROWS, TOKENS, 16, requires_grad=train)  # so that the gradient reaches the lowest layer
    with FlopCounterMode(display=False) as counter:
        logits = model(inputs_embeds=embedded).logits
        if train:
            logits.sum().backward()
    found = {str(key): value for key, value in counter.get_flop_counts()["Global"].items()}
    return sum(value for key, value in found.items() if "mm" in key and "bmm" not in key)


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_products_of_a_forward_pass_are_those_that_pytorch_counts(kind):
    make, model = KINDS_OF_MODEL[kind]
    shape = shape_of(make(), "float32", None)
    assert forward(shape, BATCH, shape.layers).products == counted(model(make()), train=False)


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_products_with_adapters_are_those_that_pytorch_counts(kind):
    """Forward, and backward through a frozen base: the head's gradient is one product, as here by autograd."""
    make, model = KINDS_OF_MODEL[kind]
    shape, lm = shape_of(make(), "float32", LORA), model(make())
    add_adapter(lm, LORA, "policy")
    assert forward(shape, BATCH, shape.layers, shape.layers).products == counted(lm, train=False)
    assert learn(shape, BATCH, shape.layers, shape.layers).products == counted(lm, train=True)


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_products_of_full_training_are_those_that_pytorch_counts(kind):
    """Without the head, which this project's backward pass computes again."""
    make, model = KINDS_OF_MODEL[kind]
    shape, lm = shape_of(make(), "float32", None), model(make())
    head = 2 * ROWS * TOKENS * shape.of_head
    assert learn(shape, BATCH, shape.layers, None).products == counted(lm, train=True) + head
    assert learn(shape, Rows(ROWS, TOKENS), shape.layers, None).products == counted(lm, train=True) - 3 * head


def test_heads_are_read_from_the_configuration():
    shape = shape_of(LLAMA, "bfloat16", None)
    assert (shape.attention, shape.cached, shape.size) == (16, 8, 2)  # 4 and 2 heads of 4
    assert shape.maps == {(16, 16): 2, (16, 8): 2, (16, 40): 2, (40, 16): 1}


def test_decoding_is_one_pass_over_the_prompt_and_one_over_each_token_but_the_last():
    """Products and attention are those of a whole pass over P + T - 1 tokens; the head reads T of them."""
    prompt, new = 7, 5
    found = decode(SHAPE, ROWS, ROWS, prompt, new, 4)
    whole = forward(SHAPE, Rows(ROWS, prompt + new - 1, new), 4, 4)
    assert found.products == pytest.approx(whole.products)
    assert found.attention == pytest.approx(whole.attention)


def test_cached_keys_and_values_are_read_once_per_step():
    """2 x rows x layers x 16 numbers of 4 bytes for each earlier token; the rest are weights, once per step."""
    prompt, new = 7, 5
    one, two = (decode(SHAPE, rows, 1, prompt, new, 0).bytes for rows in (1, 2))
    assert two - one == sum(2 * 4 * 16 * 4 * (prompt + i) for i in range(1, new))


def test_equal_prompts_are_read_once():
    apart, shared = (decode(SHAPE, 8, prompts, 7, 5, 0).products for prompts in (8, 2))
    assert apart - shared == pytest.approx(forward(SHAPE, Rows(6, 7, 1), 4).products)


def test_twice_the_rows_are_twice_the_operations_of_every_phase():
    one, two = iteration(ROLES, SIZES), iteration(ROLES, replace(SIZES, rows=32))
    for key in one:
        for kind in ("products", "attention", "elements", "updates"):
            assert getattr(two[key], kind) == pytest.approx(2 * getattr(one[key], kind)), (key, kind)


def test_twice_the_epochs_are_twice_the_training_and_no_more_rollout():
    one, two = iteration(ROLES, SIZES), iteration(ROLES, replace(SIZES, epochs=4))
    for key in one:
        assert two[key] == one[key] * (2 if key[0] in (TRAINING, OPTIMIZER) else 1)


def test_smaller_micro_batches_cost_calls_and_bytes_alone():
    one, two = iteration(ROLES, SIZES)[POLICY], iteration(ROLES, replace(SIZES, micro=2))[POLICY]
    assert (two.calls, two.bytes) == (2 * one.calls, 2 * one.bytes)
    assert (two.products, two.attention, two.elements) == (one.products, one.attention, one.elements)


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_divide_the_rows_of_every_phase(sharded):
    one, four = iteration(ROLES, SIZES), iteration(ROLES, SIZES, Ranks(4, sharded))
    for key in one:
        assert four[key].products == pytest.approx(one[key].products / 4)
        assert four[key].attention == pytest.approx(one[key].attention / 4)
        assert four[key].updates == pytest.approx(one[key].updates / (4 if sharded else 1))
    assert {SYNCHRONIZATION} == {phase for phase, _ in four.keys() - one.keys()}


def test_gradients_go_around_a_ring_once_per_optimizer_step():
    """Each of 4 steps sends 2 (N - 1) / N of 6,000 bytes."""
    assert iteration(ROLES, SIZES, Ranks(4))[SYNCHRONIZATION, ""].sent == 4 * 2 * 0.75 * 6e3


def test_shards_are_gathered_for_every_pass():
    """Of 5e4 bytes 3/4 for sampling, 3 roles' pass that scores 4 rows, and 2 roles x 4 steps of 1 pass, both ways."""
    passes = 1 + 3 + 2 * 2 * 4
    assert iteration(ROLES, SIZES, Ranks(4, True))[SYNCHRONIZATION, ""].sent == 0.75 * (5e4 * passes + 6e3 * 4)


def test_layers_below_all_adapters_run_once_per_experience():
    top = replace(ROLES, policy_layers=1, critic_layers=1, trunk=3, policy_on_trunk=True, rewards=[])
    found = iteration(top, SIZES)
    below, layer = found[SCORING, "shared layers"], 2 * 16 * 16 * SHAPE.of_layer
    assert below.products == 3 * layer
    adapter = 2 * 16 * 16 * SHAPE.of_adapters
    assert found[SCORING, "critic"].products == layer + adapter
    assert found[CRITIC].products == 2 * (2 * layer + 3 * adapter)  # two epochs
    own = iteration(replace(top, policy_layers=4, policy_on_trunk=False), SIZES)
    assert own[CRITIC] == found[CRITIC]
    assert own[POLICY].products > 3 * found[POLICY].products


def test_roles_that_a_run_lacks_cost_nothing():
    alone = iteration(replace(ROLES, gradients={"policy": 4e3}, rewards=[], reference=False), SIZES)
    assert set(alone) == {(ROLLOUT, "policy"), (SCORING, "policy"), (TRAINING, "policy"), (OPTIMIZER, "policy")}


def test_recomputed_layers_are_one_more_pass():
    plain, again = (learn(SHAPE, BATCH, 4, 4, checkpointing=on) for on in (False, True))
    more = forward(SHAPE, Rows(ROWS, TOKENS), 4, 4)
    assert [getattr(again, kind) - getattr(plain, kind) for kind in KINDS] == [getattr(more, kind) for kind in KINDS]
