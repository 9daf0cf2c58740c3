"""Scores and logprobs of one pass against plain transformers with all logits, and what the net does with memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from src.models.loading import load_tokenizer
from src.models.reward_choices import Pretrained, RewardChoice, SharedBaseAdapter
from src.models.reward_net import RewardNet
from tests.models.architectures import DECODERS, write
from tests.tiny import FOREIGN_WARNINGS, LORA, TinyCorpus, model_settings

pytestmark = FOREIGN_WARNINGS

CHOSEN = [[4, 5, 6, 7, 8, 1], [9, 10, 11, 1], [12, 13, 14, 15, 1]]
REJECTED = [[4, 5, 3, 1], [9, 8, 7, 6, 5, 4, 1], [12, 1]]
ASKED = [4, 2, 5]  # how many tokens at the end of each chosen row are the response's; the last row is nothing else


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask of both halves, padded on the left with a word, and which tokens of the chosen are asked for."""
    rows = [*CHOSEN, *REJECTED]
    width = max(map(len, rows)) + 1
    ids = torch.tensor([[3] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    asked = torch.tensor([[place >= width - count for place in range(width)] for count in ASKED])
    return ids, mask, asked


def make(kind: str, path: str, **settings: Any) -> RewardNet:
    """The net of a choice in float64, its adapters off the start."""
    lora = None if kind == "full" else LORA
    base = model_settings(path, dtype="float64", **settings)
    choice: RewardChoice = SharedBaseAdapter(base, LORA) if kind == "adapter" else Pretrained(path, lora, False)
    net = choice.build(choice.build_tokenizer(TinyCorpus()), 1, True).double()
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
    net.normalize(0.3, 1.5)
    return net.eval()


def plain(net: RewardNet) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and logprobs, each row alone and unpadded, by whole forwards of the net's classifier and head."""
    scores, logprobs = [], []
    for row in [*CHOSEN, *REJECTED]:
        output = net.classifier(input_ids=torch.tensor([row]), output_hidden_states=True)
        scores.append(output.logits[0, 0] + net.bias)
        if len(logprobs) < len(CHOSEN):
            logits = nn.functional.linear(output.hidden_states[-1][0], net.lm_head.weight)
            places = [t for t in range(len(row) - ASKED[len(logprobs)], len(row)) if t > 0]
            logprobs.append(torch.stack([logits[t - 1].log_softmax(0)[row[t]] for t in places]))
    return scores, logprobs


def mixed(scores: Tensor, logprobs: Tensor) -> Tensor:
    """A different weight for every number."""
    own, of_tokens = (torch.linspace(-1, 2, len(x), dtype=x.dtype) for x in (scores, logprobs))
    return (own * scores).sum() + (of_tokens * logprobs).sum()


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["adapter", "full", "lora"])
def test_scores_and_logprobs_of_one_pass_are_those_of_whole_logits(kind: str, name: str, tmp_path: Path) -> None:
    """Checklist 1, 24, 56. Values and the gradients of all that is trained; a first token is never predicted."""
    net = make(kind, write(tmp_path, name))
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    scores, logprobs = net.scores_and_logprobs(*batch())
    expected_scores, expected = plain(net)
    assert len(logprobs) == sum(ASKED) - 1
    assert_close(scores, torch.stack(expected_scores), atol=1e-10, rtol=0)
    assert_close(logprobs, torch.cat(expected), atol=1e-10, rtol=0)
    found = torch.autograd.grad(mixed(scores, logprobs), trained.values(), materialize_grads=True)
    wanted = torch.autograd.grad(
        mixed(torch.stack(expected_scores), torch.cat(expected)), trained.values(), materialize_grads=True
    )
    assert_close(dict(zip(trained, found, strict=True)), dict(zip(trained, wanted, strict=True)), atol=1e-9, rtol=1e-9)
    assert sum(bool(x.abs().max() > 1e-6) for x in found) > len(found) / 2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_scores_without_logprobs_are_the_same(name: str, tmp_path: Path) -> None:
    net = make("adapter", write(tmp_path, name))
    ids, mask, asked = batch()
    assert_close(net.scores(ids, mask), net.scores_and_logprobs(ids, mask, asked)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_recomputed_layers_give_the_same_numbers_and_gradients(name: str, tmp_path: Path) -> None:
    """With model.gradient_checkpointing; and while a gradient is computed the layers do recompute."""
    path, found, passes = write(tmp_path, name), [], []
    for checkpointing in (False, True):
        net, calls = make("adapter", path, gradient_checkpointing=checkpointing), []
        for layer in net.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                next(layer.children()).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trained = [p for p in net.parameters() if p.requires_grad]
        value = mixed(*net.scores_and_logprobs(*batch()))
        found.append([value.detach(), *torch.autograd.grad(value, trained, materialize_grads=True)])
        passes.append(len(calls))
        assert not any(module.training for module in net.modules())
    assert_close(found[0], found[1], atol=1e-12, rtol=1e-12)
    assert passes[1] > passes[0]


def test_a_saved_net_scores_as_the_one_that_goes_on(tmp_path: Path) -> None:
    """Merged, normalized, and as plain transformers reads it; saving leaves the net as it was."""
    path = write(tmp_path / "base", "gpt2")
    net, (ids, mask, _) = make("adapter", path), batch()
    before = net.scores(ids, mask).detach()
    net.save(tmp_path / "run", load_tokenizer(path))
    assert_close(net.scores(ids, mask).detach(), before, atol=0, rtol=0)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model", dtype=torch.float64).eval()
    with torch.no_grad():
        alone = [saved(input_ids=torch.tensor([row])).logits[0, 0] for row in [*CHOSEN, *REJECTED]]
    assert_close(torch.stack(alone), before, atol=1e-6, rtol=0)


def test_the_head_beside_an_adapter_is_frozen_and_the_language_models(tmp_path: Path) -> None:
    path = write(tmp_path, "llama")
    net, lm = make("adapter", path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    assert net.lm_head is not None
    assert torch.equal(net.lm_head.weight, lm.get_output_embeddings().weight)
    assert not net.lm_head.weight.requires_grad
