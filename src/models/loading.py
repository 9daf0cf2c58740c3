"""Models and tokenizers from a folder or the hub; a failure gives one clear sentence."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.errors import ModelError
from src.kernels.fast_layers import with_fast_layers
from src.models.accounting import load_whole, require_end_tokens
from src.models.adapter_folders import adapter_base, adapter_config, load_whole_adapter, vocabulary_rows
from src.models.gguf import is_gguf, load_gguf, source
from src.models.quantized import merged, quantize
from src.models.settings import ModelSettings
from src.models.tokenizer_files import adopt_processors_template, class_of, require_own_rules
from src.types import Corpus
from src.utils.hub import LFS_POINTER, LFS_PULL, for_hub

# raised by transformers for a folder that it cannot read, for truncated or unfitting weights, and for a config.json
# with sizes or names that no architecture can be built from
UNUSABLE = (
    OSError, ValueError, UnpicklingError, SafetensorError, RuntimeError, LookupError, TypeError, AttributeError,
    ArithmeticError, AssertionError, StrictDataclassError, struct.error,
)  # fmt: skip


def absent(path: str, error: Exception, key: str = "model.path") -> ModelError:
    """One sentence: which model is missing, why, and the two ways to provide it."""
    if isinstance(error, ModelError):  # already one sentence, about the base of an adapter
        return error
    folder = Path(path).expanduser()
    if "trust_remote_code" in str(error):
        how = "model.trust_remote_code=true runs it" if key == "model.path" else "here it is never run"
        return ModelError(f"no usable model at {path!r} ({key}): it comes with its own code, and {how}")
    if os.path.isdir(folder):  # False also for an invalid path
        is_model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        why = _first_line(error) if is_model else "the folder holds no config.json"
        return ModelError(f"no usable model at {path!r} ({key}): {_of_files(folder, is_model) or why}")
    if os.path.isfile(folder):
        why = f"as a GGUF file: {_first_line(error)}" if is_gguf(path) else "as it is a file; give its folder"
        return ModelError(f"no usable model at {path!r} ({key}): it cannot be read {why}")
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        return ModelError(
            f"no usable model at {path!r}: there is no such folder; give one with {key}=FOLDER, or a name on the hub"
        )
    return ModelError(
        f"no usable model at {path!r}: it is no local folder, not in the hub's cache, and the hub cannot be reached or "
        f"does not have it; give a local folder with {key}=FOLDER, or download it once where there is a network: "
        f"`hf download {path}`"
    )


def _of_files(folder: Path, is_model: bool) -> str | None:
    """What is wrong with a model's folder by the files in it, before any library's words; None for nothing."""
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{file.name} is a pointer of git-lfs, not the file itself: {LFS_PULL}"
    files = [] if is_model else sorted(file.name for file in folder.iterdir() if is_gguf(file.name))
    return f"the folder holds GGUF files, of which one is given by its name: {folder / files[0]}" if files else None


def _first_line(error: Exception) -> str:
    first, *others = [line.strip() for line in str(error).splitlines()] or [""]
    first = f"{first} {others[0]}" if first.endswith(":") and others else first
    speaks = bool(first) and isinstance(error, OSError | ValueError | RuntimeError | StrictDataclassError)
    return first if speaks else f"{type(error).__name__}: {first}"


def load_config(path: str, key: str = "model.path", *, trusted: bool = False) -> PretrainedConfig:
    """The architecture at `path`, without weights; of the base if `path` is an adapter. Raises `ModelError`.

    `trusted`: code in the folder may be run.
    """
    try:
        base = adapter_base(path)
        if base is not None:
            config = load_config(base, trusted=trusted)
            config.get_text_config().vocab_size = vocabulary_rows(path) or config.get_text_config().vocab_size
            return config
        config = AutoConfig.from_pretrained(**source(path, key), trust_remote_code=trusted)
    except UNUSABLE as error:
        raise absent(path, error, key) from error
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method", "no named method") if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"no usable model at {path!r} ({key}): its weights are quantized ({method}), which is not supported: give "
            f"the model in float32, bfloat16 or float16"
        )
    return config


def load_decoder_config(path: str, *, trusted: bool = False) -> PretrainedConfig:
    """`load_config` of a language model. Raises `ModelError` also for an encoder-decoder, as one half of it is none."""
    config = load_config(path, trusted=trusted)
    if config.is_encoder_decoder:
        raise ModelError(
            f"no usable model at {path!r} (model.path): a {config.model_type} has an encoder and a decoder; PPO needs "
            f"a decoder alone, such as GPT-2, Llama or Qwen"
        )
    return config


def load_tokenizer(path: str, key: str = "model.path", *, trusted: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, padding on the left; without a padding token it pads with its end token.

    Masks are made by position everywhere, so padding with the end token is safe. The end token of an encoder is its
    separator. An adapter's folder without a tokenizer has that of its base. `trusted`: code in the folder may be run.
    Raises `ModelError` when there is no tokenizer, one without an end token, or one of another kind than its file.
    """
    base = adapter_base(path)
    if base is not None and not any(Path(path).glob("tokenizer*")):
        return load_tokenizer(base, trusted=trusted)
    try:
        tokenizer: PreTrainedTokenizerBase = class_of(path).from_pretrained(
            **source(path, key), padding_side="left", trust_remote_code=trusted
        )
    except UNUSABLE as error:
        raise absent(path, error, key) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one even without files
        raise ModelError(f"no usable tokenizer at {path!r} ({key}): its files are not there")
    if not is_gguf(path):
        require_own_rules(tokenizer, path, key)
        adopt_processors_template(tokenizer, path)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer at {path!r} has no end-of-text token: set eos_token in its folder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fitted(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer, checked: every token must have a row in the model's embedding.

    Only a padding token beyond the embedding is replaced, by the end token: padding is never read. Warns when model
    and tokenizer have different end tokens. Raises `ModelError` for a tokenizer of another model.
    """
    rows = config.get_text_config().vocab_size
    beyond = {token for token, number in tokenizer.get_vocab().items() if number >= rows}
    if beyond == {tokenizer.pad_token} and tokenizer.pad_token_id != tokenizer.eos_token_id:
        warnings.warn(f"{path}: no embedding for {tokenizer.pad_token}, so the end token pads instead", stacklevel=2)
        tokenizer.pad_token = tokenizer.eos_token
    elif beyond:
        raise ModelError(
            f"the tokenizer at {path!r} has tokens up to id {max(tokenizer.get_vocab().values())}, but the model's "
            f"embedding has {rows} rows: it is the tokenizer of another model, or tokens were added to it"
        )
    end = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end != [None] and tokenizer.eos_token_id not in end:
        warnings.warn(
            f"{path}: the model's configuration ends texts with token {end}, its tokenizer with "
            f"{tokenizer.eos_token_id} ({tokenizer.eos_token}); each of them ends a response",
            stacklevel=2,
        )
    return tokenizer


def build_tokenizer(model: ModelSettings, corpus: Corpus | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in the weights' folder, or one made from the corpus for a model from scratch."""
    if model.path is not None:
        trusted = model.trust_remote_code
        tokenizer, config = load_tokenizer(model.path, trusted=trusted), load_config(model.path, trusted=trusted)
        return fitted(tokenizer, config, model.path)
    assert model.scratch is not None  # ModelSettings requires a path or scratch
    assert corpus is not None
    return model.scratch.tokenizer(corpus.texts("train"))


def load_causal_lm(model: ModelSettings, path: str | None = None) -> PreTrainedModel:
    """The language model at `path` (default: `model.path`) in eval mode.

    A folder with a LoRA adapter gives its base with the adapter merged in, the fine-tuned model. With `model.quantize`
    its linear layers are then held in few bits. Raises `ModelError`.
    """
    path = path or model.path
    if path is None:
        raise ModelError(f"model {model.name!r} has no weights yet: run stage=sft first, or set model.path")
    config = load_decoder_config(path, trusted=model.trust_remote_code)
    plain = replace(model, quantize=None)
    options = model.load_options() | {"attn_implementation": attention_of(config, model.attn_implementation)}
    try:
        base = adapter_base(path)
        if is_gguf(path):
            lm = load_gguf(path, **options)
        elif base is None:
            lm = load_whole(AutoModelForCausalLM, for_hub(path), "model.path", **options)
            require_end_tokens(path)
        else:
            lm = merged(load_whole_adapter(load_causal_lm(plain, base), path, "model.path"))
    except UNUSABLE as error:
        raise absent(path, error) from error
    lm.name_or_path = path
    name_backbone(lm)
    quantize(lm, model.quantize)
    return with_fast_layers(lm.eval()) if model.fast_cpu else lm.eval()


def attention_of(config: PretrainedConfig, wanted: str) -> str:
    """The attention to load a language model with: "eager", the same in plain steps, if it has no "sdpa"."""
    kinds = AutoModelForCausalLM._model_mapping
    kind = kinds[type(config)] if type(config) in kinds else None  # None: code from the model's folder
    return "eager" if wanted == "sdpa" and kind is not None and not kind._supports_sdpa else wanted


def name_backbone(lm: PreTrainedModel) -> None:
    """Let `lm.base_model` be the backbone also where transformers names a part that is not there (Llama 4)."""
    if lm.base_model is lm:
        parts = (name for name, part in lm.named_children() if isinstance(part, PreTrainedModel))
        lm.base_model_prefix = next(parts, lm.base_model_prefix)


def run_part(path: str, part: str) -> str:
    """`path`, or its subfolder `part` ("model" or "adapter") if it is the folder of a run."""
    return str(Path(path) / part) if (Path(path) / part).is_dir() else path


def load_reward_model(path: str, fast_cpu: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one output and its own tokenizer, from a folder, a run's folder or the hub.

    Raises `ModelError` when it has another number of outputs, or when the folder lacks its score head (transformers
    would silently make a random one).
    """
    path = run_part(path, "model")
    try:
        if adapter_base(path) is not None:
            model = _merged_classifier(path)
        else:
            kind = AutoModelForSequenceClassification
            model = load_whole(kind, for_hub(path), "reward.path", trust_remote_code=False)
    except UNUSABLE as error:
        raise absent(path, error, "reward.path") from error
    if model.config.num_labels != 1:
        raise ModelError(f"the reward model at {path!r} has {model.config.num_labels} outputs where 1 is needed")
    tokenizer = fitted(load_tokenizer(path, "reward.path"), model.config, path)
    model = model.float().eval().requires_grad_(False)
    return with_fast_layers(model) if fast_cpu else model, tokenizer


def _merged_classifier(path: str) -> PreTrainedModel:
    """The sequence classifier of a folder of peft (SEQ_CLS): its base with adapter and score head."""
    if (Path(path) / "reward.json").is_file():  # the constant in there is no tensor
        raise ModelError(
            f"reward.path={path}: this adapter is for reward=adapter; reward=learned reads model/ next to it"
        )
    config = adapter_config(path)
    if config is None or config.task_type != "SEQ_CLS":
        raise ModelError(f"reward.path={path} is no trained reward model: its adapter has no score head (task SEQ_CLS)")
    kind = AutoModelForSequenceClassification
    base = load_whole(
        kind, for_hub(adapter_base(path) or ""), "reward.path", new=[], num_labels=1, trust_remote_code=False
    )
    return merged(load_whole_adapter(base, path, "reward.path"))


def context_length(config: PretrainedConfig) -> int | None:
    """How many tokens the model can read; None if its configuration has no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def readable_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a model can read; None if neither its configuration nor its tokenizer has a limit."""
    limits = (context_length(config), tokenizer.model_max_length)
    return min((limit for limit in limits if limit is not None and limit < 10**9), default=None)  # huge: unknown


def unmatched_targets(config: PretrainedConfig, targets: str | Sequence[str]) -> list[str]:
    """The LoRA targets that match no module name of the architecture; looked up on the meta device."""
    if isinstance(targets, str):
        return []
    with torch.device("meta"):
        # a configuration class from a model's folder was loaded by a user who trusts that folder
        trusted = type(config).__module__.startswith("transformers_modules.")
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        names = [name for name, _ in lm.named_modules()]
    return [target for target in targets if not any(n == target or n.endswith("." + target) for n in names)]
