"""Folders in, models out: adapters are merged, and what cannot work is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2ForSequenceClassification, PreTrainedTokenizerBase

from src.data.tokenizers import byte_level_bpe
from src.errors import ModelError
from src.kernels.fast_layers import TransposedLinear
from src.models.loading import build_tokenizer, load_causal_lm, load_reward_model, load_tokenizer
from src.rewards.learned import LearnedReward
from tests.tiny import (
    FAST_CPU,
    FOREIGN_WARNINGS,
    TinyCorpus,
    gpt2_config,
    make_roles,
    model_settings,
    seeded,
    tokenizer,
    write_lm,
    write_reward_model,
)

pytestmark = FOREIGN_WARNINGS

IDS = torch.tensor([[4, 7, 9, 5, 6]])


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[operator]


@pytest.mark.filterwarnings(
    "ignore:Could not find a config file in:UserWarning"
)  # peft looks for the base's vocabulary
def test_an_adapter_on_an_adapter_is_the_sum_of_both(tmp_path: Path) -> None:
    """Checklist 33, 65. An adapter on an adapter folder loads as the sum of all three.

    Plain transformers would load base and first adapter unmerged, and put the second beside the first: so the project
    writes no such adapter itself, only the merged model.
    """
    base = write_lm(tmp_path / "base")
    make_roles(base, spread=0.2).save_adapter(tmp_path / "first")
    tokenizer().save_pretrained(tmp_path / "first")
    roles = make_roles(str(tmp_path / "first"), spread=0.2)
    assert not roles.save_adapter(tmp_path / "second")
    assert not (tmp_path / "second").exists()
    roles.peft.save_pretrained(str(tmp_path / "chain"), selected_adapters=["policy"])
    expected = logits(roles.merged_policy())
    chain = model_settings(str(tmp_path / "chain" / "policy"))
    assert_close(logits(load_causal_lm(chain)), expected, atol=1e-4, rtol=1e-4)


def test_a_folder_with_an_adapter_is_loaded_merged(tmp_path: Path) -> None:
    """Checklist 33."""
    base = write_lm(tmp_path / "base")
    make_roles(base, spread=0.2).save_adapter(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    lm = load_causal_lm(model_settings(str(tmp_path / "adapter")))
    assert not isinstance(lm, PeftModel)
    assert not any("lora" in name for name, _ in lm.named_parameters())
    assert_close(logits(lm), logits(plain), atol=1e-5, rtol=0)
    assert (logits(lm) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01


def test_a_model_that_is_nowhere_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no usable model at"):
        load_causal_lm(model_settings(str(tmp_path / "absent")))
    with pytest.raises(ModelError, match="no usable model at"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="no usable model at"):
        load_reward_model(str(tmp_path / "absent"))


def refusal(path: Path) -> str:
    """What loading the model at a path, or else its tokenizer, is answered with."""
    with pytest.raises(ModelError) as refused:  # noqa: PT012, whichever of them it is
        load_causal_lm(model_settings(str(path)))
        load_tokenizer(str(path))
    assert "\n" not in str(refused.value)
    return str(refused.value).removeprefix(f"no usable model at {str(path)!r} (model.path): ")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_git_lfs_has_not_fetched_is_named(tmp_path: Path, name: str) -> None:
    write_lm(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    assert refusal(tmp_path) == (
        f"{name} is a pointer of git-lfs, not the file itself: run `git lfs pull` in its folder, or fetch it by "
        "`hf download`"
    )


def test_a_file_in_place_of_its_folder_is_said(tmp_path: Path) -> None:
    write_lm(tmp_path)
    assert refusal(tmp_path / "model.safetensors") == "it cannot be read as it is a file; give its folder"


@pytest.mark.parametrize(
    "content", ["{", '{"eos_token_id": "1"}', '{"eos_token_id": [1, "2"]}', '{"eos_token_id": {}}']
)
def test_end_tokens_that_cannot_be_read_are_not_left_out(tmp_path: Path, content: str) -> None:
    """transformers goes on without the file; no answer would then end where the model was trained to end it."""
    write_lm(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    words = "generation_config.json: eos_token_id must be" if len(content) > 1 else "generation_config.json' is not a"
    assert words in refusal(tmp_path)


def test_a_weight_that_is_no_number_is_said(tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(write_lm(tmp_path))
    with torch.no_grad():
        lm.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    lm.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"gives NaN: one of its weights is no finite number"):
        make_roles(str(tmp_path))


def test_a_reward_model_without_a_score_head_is_refused(tmp_path: Path) -> None:
    """Checklist 25. transformers would make a random head and go on."""
    with pytest.raises(ModelError, match=r"score\.weight"):
        load_reward_model(write_lm(tmp_path))


def test_a_reward_model_with_two_outputs_is_refused(tmp_path: Path) -> None:
    """Checklist 25."""
    seeded(lambda: GPT2ForSequenceClassification(gpt2_config(num_labels=2)), 0).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="2 outputs"):
        load_reward_model(str(tmp_path))


def test_a_reward_model_is_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    """Checklist 25, 59."""
    model, _ = load_reward_model(write_reward_model(tmp_path, attn_pdrop=0.5))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_tokenizers_pad_on_the_left_and_need_an_end_token(tmp_path: Path) -> None:
    """Checklist 9."""
    bare = tokenizer()
    bare.padding_side = "right"
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "no_pad")
    loaded = load_tokenizer(str(tmp_path / "no_pad"))
    assert (loaded.padding_side, loaded.pad_token_id) == ("left", loaded.eos_token_id)
    bare.eos_token = None
    bare.save_pretrained(tmp_path / "no_end")
    assert AutoTokenizer.from_pretrained(tmp_path / "no_end").eos_token_id is None
    with pytest.raises(ModelError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "no_end"))


def retokenized(folder: Path, *added: str, **special: str | None) -> str:
    """A model whose tokenizer learned further tokens."""
    path = write_lm(folder)
    changed = tokenizer()
    changed.add_tokens(list(added))
    for name, token in special.items():
        setattr(changed, name, token)
    changed.save_pretrained(path)
    return path


def fit_tokenizer(path: str) -> PreTrainedTokenizerBase:
    return build_tokenizer(model_settings(path), TinyCorpus())


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path) -> None:
    size = len(tokenizer())
    with pytest.raises(ModelError, match=rf"tokens up to id {size + 1}, but the model's embedding has {size} rows"):
        fit_tokenizer(retokenized(tmp_path, "one", "two"))


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """A byte-level vocabulary beside a model of a few words."""
    path = write_lm(tmp_path)
    byte_level_bpe(["some text"], 300).save_pretrained(path)
    with pytest.raises(ModelError, match="it is the tokenizer of another model, or tokens were added to it"):
        fit_tokenizer(path)


def test_a_padding_token_beyond_the_embedding_gives_way_to_the_end_token(tmp_path: Path) -> None:
    """Checklist 9. Safe, as masks are made by position."""
    path = retokenized(tmp_path, "[PAD]", pad_token="[PAD]")
    with pytest.warns(UserWarning, match=r"no embedding for \[PAD\], so the end token pads instead"):
        loaded = fit_tokenizer(path)
    assert loaded.pad_token_id == loaded.eos_token_id < len(tokenizer())


def test_a_padding_token_that_is_the_end_token_is_fine(tmp_path: Path) -> None:
    """Checklist 9."""
    loaded = fit_tokenizer(retokenized(tmp_path, pad_token=tokenizer().eos_token))
    assert loaded.pad_token_id == loaded.eos_token_id


def test_an_end_token_other_than_the_models_is_said(tmp_path: Path) -> None:
    path = retokenized(tmp_path, eos_token=str(tokenizer().convert_ids_to_tokens(7)))
    with pytest.warns(UserWarning, match=r"ends texts with token \[1\], its tokenizer with 7"):
        fit_tokenizer(path)


def test_a_tokenizer_with_fewer_tokens_than_the_embedding_is_fine(tmp_path: Path) -> None:
    """Many models round the embedding up."""
    path = write_lm(tmp_path, vocab_size=len(tokenizer()) + 40)
    assert len(fit_tokenizer(path)) == len(tokenizer())


def test_the_fast_ways_are_there_where_they_are_asked_for(tmp_path: Path) -> None:
    """model.fast_cpu, also of a base below an adapter, of roles and their reward model, and of these tests' own."""
    base = write_lm(tmp_path / "base", n_embd=512)
    make_roles(base).save_adapter(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    reward = write_reward_model(tmp_path / "reward", n_embd=512)
    for fast in (True, False):
        for path in (base, str(tmp_path / "adapter")):
            lm = load_causal_lm(model_settings(path, fast_cpu=fast))
            assert hasattr(lm.base_model, "fast_pass") == fast
            assert any(isinstance(module, TransposedLinear) for module in lm.modules()) == fast
        roles = make_roles(base, fast_cpu=fast)
        assert roles.fast_cpu == fast
        for model in (LearnedReward(reward).load(roles).model, load_reward_model(reward, fast)[0]):
            assert hasattr(model.base_model, "fast_pass") == fast
    assert make_roles(base).fast_cpu == FAST_CPU
