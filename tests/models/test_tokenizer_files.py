"""A tokenizer reads texts as the file in its folder does, and a processor's chat template is not left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerBase

from src.data.tokenizers import byte_level_bpe
from src.errors import ModelError
from src.models.loading import load_tokenizer
from tests.models.architectures import write
from tests.tiny import FOREIGN_WARNINGS, TEXTS, write_lm

pytestmark = FOREIGN_WARNINGS

TEMPLATE, OTHER = "{{ messages[0].content }}", "Q: {{ messages[0].content }}"


def named(folder: Path, name: str | None) -> str:
    """The tokenizer of words, of which tokenizer_config.json says another class (None: no class)."""
    path = write_lm(folder)
    configure(folder, tokenizer_class=name)
    return path


def configure(folder: Path, file: str = "tokenizer_config.json", **changes: Any) -> None:
    old = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    new = {key: value for key, value in (old | changes).items() if value is not None}
    (folder / file).write_text(json.dumps(new))


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "BertTokenizer", None])
def test_a_class_that_reads_otherwise_than_the_file_is_refused(name: str | None, tmp_path: Path) -> None:
    """Without a class, transformers takes that of the architecture, here GPT-2's; the remedy is the sentence's own."""
    kind = "GPT2Tokenizer" if name is None else name.removesuffix("Fast")
    path = named(tmp_path, name)
    with pytest.raises(
        ModelError, match=rf"is loaded as a {kind}, which reads texts otherwise than its tokenizer\.jso"
    ):
        load_tokenizer(path)
    configure(tmp_path, tokenizer_class="TokenizersBackend")
    assert_reads_as_the_file(load_tokenizer(path), path)


def test_a_folder_that_names_its_file_is_read_by_it_beside_any_architecture(tmp_path: Path) -> None:
    """AutoTokenizer takes Qwen2's own rules for it, by which "the film was good" is one unknown word."""
    path = write(tmp_path, "qwen2")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    assert len(AutoTokenizer.from_pretrained(path)("the film was good")["input_ids"]) == 1
    assert_reads_as_the_file(load_tokenizer(path), path)


def assert_reads_as_the_file(made: PreTrainedTokenizerBase, path: str) -> None:
    file = Tokenizer.from_file(f"{path}/tokenizer.json")
    for text in TEXTS:
        assert made(text, add_special_tokens=False)["input_ids"] == file.encode(text, add_special_tokens=False).ids


def write_llama(folder: Path) -> str:
    """A tokenizer.json as Llama 2 has it: the space before a text is a rule of its normalizer."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    made.save(str(folder / "tokenizer.json"))
    configure(folder, "config.json", model_type="llama", vocab_size=made.get_vocab_size())
    configure(folder, tokenizer_class="LlamaTokenizer", eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    return str(folder)


def write_gpt2(folder: Path, **options: Any) -> str:
    bytes_of = byte_level_bpe(TEXTS, 300)
    bytes_of.save_pretrained(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [tuple(pair) for pair in vocabulary["merges"]]
    made = GPT2TokenizerFast(vocab=vocabulary["vocab"], merges=merges, eos_token=bytes_of.eos_token)
    made.save_pretrained(folder)
    configure(folder, **options)
    return str(folder)


def test_a_class_that_fits_is_used(tmp_path: Path) -> None:
    """Also one that puts a space before a text, as RoBERTa's may be."""
    (tmp_path / "llama").mkdir()
    path = write_llama(tmp_path / "llama")
    assert type(load_tokenizer(path)).__name__ == "LlamaTokenizer"
    assert_reads_as_the_file(load_tokenizer(path), path)
    path = write_gpt2(tmp_path / "gpt2")
    assert type(load_tokenizer(path)).__name__ == "GPT2Tokenizer"
    assert_reads_as_the_file(load_tokenizer(path), path)
    spaced = load_tokenizer(write_gpt2(tmp_path / "spaced", add_prefix_space=True))
    assert spaced("the")["input_ids"] == spaced(" the")["input_ids"]


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_processors_chat_template_is_the_tokenizers(file: str, tmp_path: Path) -> None:
    """transformers 4 wrote it there, and its tokenizers of today do not look for it."""
    path = write_lm(tmp_path)
    configure(tmp_path, file, chat_template=TEMPLATE)
    assert load_tokenizer(path).chat_template == TEMPLATE
    configure(tmp_path, file, chat_template=[{"name": "default", "template": OTHER}])
    assert load_tokenizer(path).chat_template == {"default": OTHER}


@pytest.mark.parametrize("file", ["chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_that_is_not_used_is_named(file: str, tmp_path: Path) -> None:
    path = write_lm(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    configure(tmp_path, file, chat_template=TEMPLATE)
    assert load_tokenizer(path).chat_template == TEMPLATE
    configure(tmp_path, file, chat_template=OTHER)
    with pytest.warns(UserWarning, match=rf"the chat template in {file} is not used, as the tokenizer has another"):
        assert load_tokenizer(path).chat_template == TEMPLATE


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 5}', '{"chat_template": [{"name": "default"}]}'])
def test_a_chat_template_that_cannot_be_read_is_one_sentence(content: str, tmp_path: Path) -> None:
    path = write_lm(tmp_path)
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(ModelError, match=r"chat_template\.json(: chat_template must be a text| cannot be read: )"):
        load_tokenizer(path)
