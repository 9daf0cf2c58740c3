"""Policy, critic and reference: what they compute, whom their gradients reach, and what leaves them unchanged."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from src.core.masking import masked
from src.errors import ModelError
from src.models.roles import FullRoles, LoraRoles, Roles
from src.models.settings import LoraSettings
from src.rollout.minibatches import join, micro_batches
from src.types import Rollout, select
from tests.tiny import (
    FIRST_WORD,
    FOREIGN_WARNINGS,
    LORA,
    PAD,
    assert_rows_close,
    make_roles,
    plain_logprobs,
    plain_model,
    ragged_rollout,
    rows_of,
    same_bits,
    snapshot,
    tokenizer,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

KINDS = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


def plain_values(roles: Roles, rollout: Rollout) -> list[list[float]]:
    """Head of the hidden state before each response token, row by row, without padding."""
    model = plain_model(roles, "critic")
    weight, bias = roles.value_head.weight.detach().double(), roles.value_head.bias.detach().double()
    rows = []
    for row in range(len(rollout.response_ids)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        with torch.no_grad():
            output = model(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
        hidden = output.hidden_states[-1][0].double()
        values = (hidden @ weight[0] + bias).tolist()
        rows.append(values[len(prompt) - 1 : -1])
    return rows


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_logprobs_are_those_of_a_plain_forward_one_step_earlier(
    base: str, lora: LoraSettings | None, temperature: float, role: Any
) -> None:
    """Checklist 1, 2, 14. Left-padded rows in one batch against unpadded rows, one at a time."""
    roles, rollout = make_roles(base, lora, spread=0.1), ragged_rollout()
    logprobs, entropy = roles.distribution(rollout, temperature, role).logprobs_and_entropy()
    expected = plain_logprobs(plain_model(roles, role), rollout, temperature)
    assert_rows_close(rows_of(logprobs, rollout.response_mask), expected, 1e-5)
    assert not logprobs[~rollout.response_mask].any()
    assert not entropy[~rollout.response_mask].any()


def test_entropy_is_that_of_the_tempered_distribution(base: str) -> None:
    """Checklist 14, 53."""
    roles, rollout = make_roles(base, spread=0.1), ragged_rollout()
    entropy = roles.distribution(rollout, 0.7).logprobs_and_entropy()[1]
    model, mask = plain_model(roles, "policy"), rollout.response_mask
    for row in range(len(mask)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][mask[row]].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = torch.distributions.Categorical(logits=logits.double() / 0.7).entropy()
        assert_close(entropy[row][mask[row]].double(), expected, atol=1e-5, rtol=0)


@KINDS
def test_values_are_the_head_on_the_critics_hidden_states(base: str, lora: LoraSettings | None) -> None:
    """Checklist 1, 2. V(s_t) reads the state before token t."""
    roles, rollout = make_roles(base, lora, spread=0.1), ragged_rollout()
    values = roles.values(rollout)
    assert_rows_close(rows_of(values, rollout.response_mask), plain_values(roles, rollout), 1e-5)
    assert not values[~rollout.response_mask].any()


@KINDS
@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_neither_batch_size_nor_order_changes_logprobs_or_values(
    base: str, lora: LoraSettings | None, size: int
) -> None:
    """Checklist 3, 36."""
    roles, rollout = make_roles(base, lora, spread=0.1), ragged_rollout()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    shuffled = select(rollout, order)
    for function in (
        lambda r: roles.distribution(r, 1.0).logprobs(),
        lambda r: roles.distribution(r, 1.0).logprobs_and_entropy()[1],
        roles.values,
    ):
        with torch.no_grad():
            whole = function(rollout)
            pieces = join([(index, function(micro)) for index, micro in micro_batches(shuffled, size)], whole.shape)
        assert_close(pieces, whole[order], atol=1e-5, rtol=0)


def with_random_pads(rollout: Rollout) -> Rollout:
    """The same rollout with words, not padding, where nothing counts."""
    draws = torch.Generator().manual_seed(9)

    def scramble(ids: Tensor, mask: Tensor) -> Tensor:
        return ids.where(mask, torch.randint(0, len(tokenizer()), ids.shape, generator=draws))

    changed = replace(
        rollout,
        prompt_ids=scramble(rollout.prompt_ids, rollout.prompt_mask),
        response_ids=scramble(rollout.response_ids, rollout.response_mask),
    )
    assert (changed.prompt_ids != rollout.prompt_ids).any()
    assert (changed.response_ids != rollout.response_ids).any()
    return changed


def gradients(roles: Roles, rollout: Rollout) -> list[Tensor]:
    """Of a fixed function of logprobs, entropy and values, one role after the other."""
    for parameter in roles.parameters():
        parameter.grad = None
    scale = torch.linspace(-1, 1, rollout.response_mask.numel()).view(rollout.response_mask.shape)
    logprobs, entropy = roles.distribution(rollout, 0.8).logprobs_and_entropy()
    ((logprobs + 0.3 * entropy) * scale.to(logprobs)).sum().backward()
    (roles.values(rollout) * scale.to(logprobs)).sum().backward()
    parameters = [*roles.policy_parameters(), *roles.critic_parameters()]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


@KINDS
@CHECKPOINTING
def test_the_ids_of_padding_change_nothing(base: str, lora: LoraSettings | None, checkpointing: bool) -> None:
    """Checklist 11. Neither logprobs, entropies, values nor gradients."""
    roles = make_roles(base, lora, spread=0.1, gradient_checkpointing=checkpointing)
    rollout = ragged_rollout()
    changed = with_random_pads(rollout)
    assert_close(
        roles.distribution(rollout, 1.0).logprobs_and_entropy(),
        roles.distribution(changed, 1.0).logprobs_and_entropy(),
        atol=1e-6,
        rtol=0,
    )
    assert_close(roles.values(rollout), roles.values(changed), atol=1e-6, rtol=0)
    assert_close(gradients(roles, rollout), gradients(roles, changed), atol=1e-5, rtol=1e-5)


@KINDS
def test_checkpointing_changes_no_gradient(base: str, lora: LoraSettings | None) -> None:
    """Checklist 60. Also with dropout in the configuration, which must stay off in the recomputation."""
    drop = None if lora is None else replace(lora, dropout=0.5)
    plain = make_roles(base, drop, spread=0.1)
    recomputing = make_roles(base, drop, spread=0.1, gradient_checkpointing=True)
    assert_close(gradients(recomputing, ragged_rollout()), gradients(plain, ragged_rollout()), atol=1e-6, rtol=1e-6)


def test_checkpointing_recomputes_the_layers(base: str) -> None:
    """Checklist 60. Otherwise the comparison above compares nothing."""
    roles = make_roles(base, gradient_checkpointing=True)
    calls = []
    roles.peft.get_base_model().transformer.h[0].ln_1.register_forward_hook(lambda *args: calls.append(1))
    roles.distribution(ragged_rollout(), 1.0).logprobs().sum().backward()
    assert len(calls) == 2
    assert not any(module.training for module in roles.modules())


@KINDS
@CHECKPOINTING
def test_each_loss_reaches_its_own_parameters_and_no_other(
    base: str, lora: LoraSettings | None, checkpointing: bool
) -> None:
    """Checklist 60, 33. From fresh adapters, where peft could silently drop the gradient of lora_B."""
    roles, rollout = make_roles(base, lora, gradient_checkpointing=checkpointing), ragged_rollout()
    names = {parameter: name for name, parameter in roles.named_parameters()}
    groups = {"policy": roles.policy_parameters(), "critic": roles.critic_parameters()}
    losses = {
        "policy": lambda: roles.distribution(rollout, 1.0).logprobs().sum(),
        "critic": lambda: roles.values(rollout).sum(),
    }
    for role in ("policy", "critic", "policy", "critic"):
        roles.zero_grad()
        losses[role]().backward()
        for parameter in roles.parameters():
            moved = parameter.grad is not None and bool(parameter.grad.any())
            if moved:
                assert any(parameter is mine for mine in groups[role]), f"{role} loss reaches {names[parameter]}"
            elif any(parameter is mine for mine in groups[role]):
                assert "lora_A" in names[parameter] or "c_attn.bias" in names[parameter], names[parameter]
    assert sum("lora_B" in names[p] for p in groups["policy"]) == (8 if lora else 0)


@KINDS
def test_policy_equals_reference_exactly_at_the_start(base: str, lora: LoraSettings | None) -> None:
    """Checklist 33. And the reference is the model in the folder."""
    roles, rollout = make_roles(base, lora), ragged_rollout()
    with torch.no_grad():
        policy, reference = (
            roles.distribution(rollout, 1.0).logprobs(),
            roles.distribution(rollout, 1.0, "reference").logprobs(),
        )
    assert torch.equal(policy, reference)
    folder = AutoModelForCausalLM.from_pretrained(base)
    assert_rows_close(rows_of(reference, rollout.response_mask), plain_logprobs(folder, rollout), 1e-5)


def write_adapter(base: str, folder: Path) -> str:
    """A LoRA adapter that changes the base, made with peft alone."""
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@KINDS
def test_an_adapter_folder_gives_a_reference_with_that_adapter(
    base: str, lora: LoraSettings | None, tmp_path: Path
) -> None:
    """Checklist 33. Base and adapter together are the SFT policy; the bare base is not."""
    folder, rollout = write_adapter(base, tmp_path / "sft"), ragged_rollout()
    roles = make_roles(folder, lora)
    with torch.no_grad():
        policy, reference = (
            roles.distribution(rollout, 1.0).logprobs(),
            roles.distribution(rollout, 1.0, "reference").logprobs(),
        )
    assert torch.equal(policy, reference)
    bare = AutoModelForCausalLM.from_pretrained(base)
    bare_rows = plain_logprobs(bare, rollout)
    expected = plain_logprobs(PeftModel.from_pretrained(bare, folder).eval(), rollout)
    assert abs(bare_rows[0][0] - expected[0][0]) > 1e-3  # the adapter does something
    assert_rows_close(rows_of(reference, rollout.response_mask), expected, 1e-5)


@KINDS
def test_training_the_policy_moves_neither_reference_nor_critic(base: str, lora: LoraSettings | None) -> None:
    """Checklist 59, 60."""
    roles, rollout = make_roles(base, lora), ragged_rollout()
    with torch.no_grad():
        before = roles.distribution(rollout, 1.0, "reference").logprobs(), roles.values(rollout)
    critic = snapshot(roles.critic_parameters())
    optimizer = torch.optim.SGD(roles.policy_parameters(), lr=0.5)
    roles.distribution(rollout, 1.0).logprobs().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(roles.distribution(rollout, 1.0, "reference").logprobs(), before[0])
        assert torch.equal(roles.values(rollout), before[1])
        assert not torch.allclose(roles.distribution(rollout, 1.0).logprobs(), before[0], atol=1e-3)
    assert same_bits(critic, roles.critic_parameters())


@KINDS
def test_training_the_critic_moves_neither_policy_nor_reference(base: str, lora: LoraSettings | None) -> None:
    """Checklist 59, 60."""
    roles, rollout = make_roles(base, lora), ragged_rollout()
    with torch.no_grad():
        before = [roles.distribution(rollout, 1.0, role).logprobs() for role in ("policy", "reference")]
    optimizer = torch.optim.SGD(roles.critic_parameters(), lr=0.5)
    (roles.values(rollout) - 5).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert all(
            torch.equal(roles.distribution(rollout, 1.0, r).logprobs(), b)
            for r, b in zip(("policy", "reference"), before, strict=True)
        )


def test_parameters_of_the_three_roles_do_not_overlap(base: str) -> None:
    """Checklist 59. Full fine-tuning: three models without a shared tensor; LoRA: two adapters and a head."""
    for lora in (LORA, None):
        roles = make_roles(base, lora)
        policy, critic = set(roles.policy_parameters()), set(roles.critic_parameters())
        assert policy
        assert not policy & critic
        assert all(parameter.requires_grad for parameter in policy | critic)
        frozen = set(roles.parameters()) - policy - critic
        assert frozen
        assert {parameter.data_ptr() for parameter in frozen}.isdisjoint(p.data_ptr() for p in policy | critic)
        assert roles.value_head.weight in critic


def test_full_roles_train_nothing_but_what_the_optimizers_hold(tmp_path: Path) -> None:
    """Checklist 59. The critic never uses its vocabulary head: an untied one asks for no gradient."""
    roles = make_roles(write_lm(tmp_path, tie_word_embeddings=False), None)
    held = {*roles.policy_parameters(), *roles.critic_parameters()}
    unused = [name for name, parameter in roles.named_parameters() if parameter.requires_grad and parameter not in held]
    assert unused == []


@KINDS
def test_the_trainer_cannot_switch_dropout_on(base: str, lora: LoraSettings | None) -> None:
    """Checklist 6, 59."""
    roles = make_roles(base, lora)
    roles.train()
    torch.nn.ModuleList([roles]).train()
    assert not any(module.training for module in roles.modules())


def test_half_precision_logits_give_single_precision_logprobs(base: str) -> None:
    """Checklist 58. Rounded to eight bits, a logprob would be equal to its bfloat16 self."""
    roles, rollout = make_roles(base, spread=0.1, dtype="bfloat16"), ragged_rollout()
    with roles.acting("policy") as lm, torch.no_grad():
        assert lm(input_ids=rollout.response_ids).logits.dtype == torch.bfloat16
    logprobs, entropy = roles.distribution(rollout, 1.0).logprobs_and_entropy()
    values = roles.values(rollout)
    for numbers in (logprobs, entropy, values):
        assert numbers.dtype == torch.float32
    counted = logprobs[rollout.response_mask]
    assert (counted != counted.bfloat16().float()).any()
    single = make_roles(base, spread=0.1)
    assert_close(logprobs, single.distribution(rollout, 1.0).logprobs(), atol=0.3, rtol=0)


def test_a_softmax_over_rounded_logits_is_normalized_in_float32(base: str) -> None:
    """Checklist 58. The probabilities of all first tokens sum to 1 far below bfloat16's precision."""
    roles, one = make_roles(base, dtype="bfloat16"), ragged_rollout(rows=1, response=1)
    count = len(tokenizer())
    every = select(one, torch.zeros(count, dtype=torch.int64))
    every = replace(
        every, response_ids=torch.arange(count).unsqueeze(1), response_mask=torch.ones(count, 1, dtype=bool)
    )
    with torch.no_grad():
        total = roles.distribution(every, 1.0).logprobs().double().exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5)


@KINDS
def test_the_same_seed_gives_the_same_fresh_parameters(base: str, lora: LoraSettings | None) -> None:
    torch.manual_seed(1)
    first, state = make_roles(base, lora), torch.get_rng_state()
    torch.manual_seed(2)
    second = make_roles(base, lora)
    for parameters in (Roles.policy_parameters, Roles.critic_parameters):
        name = parameters.__name__
        assert same_bits(snapshot(getattr(first, name)()), getattr(second, name)())
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # building drew from no shared stream


def test_a_lora_target_that_no_layer_has_is_refused(base: str) -> None:
    with pytest.raises(ModelError, match=r"model\.lora\.targets=\['q_proj'\] does not fit"):
        make_roles(base, replace(LORA, targets=["q_proj"]))


def test_an_error_inside_the_reference_leaves_the_adapters_on(base: str) -> None:
    """Checklist 60. Otherwise the next loss would train nothing."""
    roles, rollout = make_roles(base), ragged_rollout()
    with pytest.raises(ZeroDivisionError), roles.acting("reference"):
        raise ZeroDivisionError
    roles.distribution(rollout, 1.0).logprobs().sum().backward()
    assert all(p.grad is not None for p in roles.policy_parameters())
    roles.values(rollout).sum().backward()
    assert all(p.grad is not None for p in roles.critic_parameters())


def test_another_architecture_gives_its_own_logprobs() -> None:
    """Checklist 1, 2. Rotary positions, separate vocabulary head, attention without Conv1D."""
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=48, initializer_range=0.3, pad_token_id=0, eos_token_id=1,
        bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = LlamaForCausalLM(config).eval()
    rollout = ragged_rollout()
    expected = plain_logprobs(lm, rollout)
    roles = LoraRoles(copy.deepcopy(lm), tokenizer(), LORA, False, True)
    assert_rows_close(rows_of(roles.distribution(rollout, 1.0).logprobs(), rollout.response_mask), expected, 1e-5)


def test_logits_that_the_model_itself_bends_are_not_read_around() -> None:
    """Checklist 1, 15. Gemma 2 squashes its logits after the vocabulary head; what is trained must be what is sampled.

    Either the logprobs are right or the model is refused when the roles are built.
    """
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=48, initializer_range=0.5,
        final_logit_softcapping=1.0,
        pad_token_id=0, eos_token_id=1, bos_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    lm = Gemma2ForCausalLM(config).eval()
    rollout = ragged_rollout()
    expected = plain_logprobs(lm, rollout)
    try:
        roles = FullRoles(lm, tokenizer(), False, True)
    except ModelError:
        return
    assert_rows_close(rows_of(roles.distribution(rollout, 1.0).logprobs(), rollout.response_mask), expected, 1e-4)


def test_the_padding_id_of_the_makers_is_no_word() -> None:
    assert PAD < FIRST_WORD
    assert masked(torch.ones(1), torch.zeros(1, dtype=bool)).item() == 0
