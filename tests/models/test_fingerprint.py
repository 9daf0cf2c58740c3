"""A fingerprint tells weights apart, and tokenizers, and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.models.fingerprint import base_fingerprint, fingerprint, tokenizer_fingerprint
from tests.tiny import FOREIGN_WARNINGS, make_roles, tokenizer, write_lm

pytestmark = FOREIGN_WARNINGS


def test_adapters_do_not_change_it_and_one_bit_does(tmp_path: Path) -> None:
    """Before and after LoRA, and through a folder; then one weight is moved by the least that float32 knows."""
    folder = write_lm(tmp_path)
    before = base_fingerprint(AutoModelForCausalLM.from_pretrained(folder))
    lm = make_roles(folder, spread=0.1).peft.get_base_model()
    assert base_fingerprint(lm) == before
    with torch.no_grad():
        weight = lm.transformer.h[1].mlp.c_fc.base_layer.bias
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    assert base_fingerprint(lm) != before


def test_type_shape_and_name_count() -> None:
    """The same bytes under another type, shape or name are other tensors."""

    def of(name: str, tensor: torch.Tensor) -> str:
        module = torch.nn.Module()
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        return fingerprint(module)

    zeros = torch.zeros(2, 3)
    variants = [of("a", zeros), of("b", zeros), of("a", zeros.view(3, 2)), of("a", zeros.int())]
    assert len(set(variants)) == 4
    assert of("a", torch.zeros(2, 3)) == variants[0]


def test_a_tokenizer_is_its_rules_not_how_it_pads(tmp_path: Path) -> None:
    """Saved and read again it is the same; with a word more, another end token or a chat template it is not."""
    tokenizer().save_pretrained(tmp_path)
    same, before = AutoTokenizer.from_pretrained(tmp_path), tokenizer_fingerprint(tokenizer())
    assert tokenizer_fingerprint(same) == before
    same(["the film", "a"], padding=True, truncation=True, max_length=2)
    same.padding_side = "right"
    assert tokenizer_fingerprint(same) == before
    seen = {before}
    for change in (
        lambda t: t.add_tokens(["new"]),
        lambda t: setattr(t, "eos_token", "a"),
        lambda t: setattr(t, "chat_template", "{{ messages }}"),
    ):
        other = tokenizer()
        change(other)
        seen.add(tokenizer_fingerprint(other))
    assert len(seen) == 4
