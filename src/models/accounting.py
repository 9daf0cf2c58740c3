"""Loading in which every tensor is accounted for: none missing, none left over, none of another shape or kind.

transformers makes a tensor that it does not find at random, ignores one that it has no place for, reads whole numbers
and 8-bit floats as if they were weights, and warns at most.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from src.errors import ModelError

FLOATS = ("F64", "F32", "F16", "BF16", *map(str, (torch.float64, torch.float32, torch.float16, torch.bfloat16)))
LENIENT: Any = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
NAMED = 3  # tensors that a sentence names
SAME_FOLDER = "weights and config.json must be of one model"


def load_whole(kind: Any, path: str, key: str, *, new: list[str] | None = None, **options: Any) -> PreTrainedModel:
    """`kind.from_pretrained(path)`, with every tensor of the model from the folder and every tensor of the folder used.

    Tied weights and buffers that the architecture computes itself need not be there. With a list `new`, layers after
    the backbone may be new, whose tensors are added to it, and those of another kind of model unused. `key`: the
    setting that gives the path. Raises `ModelError` with the names of the others, and what `from_pretrained` raises.
    """
    files, where = weight_files(path), f"no usable model at {path!r} ({key})"
    model, info = kind.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    resized: set[str] = set()
    if new is not None:
        made = {name for name in missing if not _in_backbone(model, name) or ".pooler." in name}
        missing, unexpected = missing - made, {name for name in unexpected if _in_backbone(model, name)}
        resized = {name for name, *_ in info["mismatched_keys"] if not _in_backbone(model, name)}
        new += sorted(made | resized)
    refuse(where, type(model).__name__, missing, unexpected)
    for name, stored, wanted in sorted(info["mismatched_keys"], key=str):
        if name not in resized:
            raise ModelError(
                f"{where}: the tensor {name} has the shape {list(stored)}, but config.json makes it {list(wanted)}; "
                f"{SAME_FOLDER}"
            )
    require_floats(where, files, model)
    return model


def require_end_tokens(path: str) -> None:
    """Raise `ValueError` or `OSError` unless the model's generation_config.json, if there is one, can be read.

    transformers leaves a file that it cannot read out without a word, and with it the tokens that end a response.
    """
    if cached_file(path, GENERATION_CONFIG_NAME, **LENIENT) is None:
        return
    named: Any = GenerationConfig.from_pretrained(path).eos_token_id
    if any(type(token) is not int for token in (named if isinstance(named, list) else [named])) and named is not None:
        raise ValueError(f"{GENERATION_CONFIG_NAME}: eos_token_id must be a token's number, or a list, not {named!r}")


def weight_files(path: str) -> list[str]:
    """The files in which transformers looks for the weights at `path`, a folder or a name on the hub.

    Raises `ModelError` for an index that is none, or that names a file outside of its folder.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        file = cached_file(path, name, **LENIENT)
        if file is None:
            continue
        shards = _shards(file) if name.endswith(".json") else None
        return [file] if shards is None else [str(cached_file(path, shard)) for shard in shards]
    return []


def _shards(index: str) -> list[str]:
    """The names of the files in an index."""
    with open(index, encoding="utf-8") as file:
        content = json.load(file)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or "metadata" not in content:
        raise ModelError(f"{index} is no index of weights: it has no weight_map or no metadata")
    for name in sorted(set(map(str, places.values()))):
        kinds = PurePosixPath(name), PureWindowsPath(name)
        if any(kind.is_absolute() or kind.drive or ".." in kind.parts for kind in kinds):
            raise ModelError(f"{index} names the file {name}, which is outside of its folder: it is not opened")
    return sorted(set(places.values()))


def require_floats(where: str, files: Iterable[str], model: PreTrainedModel) -> None:
    """Raise `ModelError` if a weight of the model is stored as whole numbers or 8-bit floats: it needs scales."""
    buffers = tuple(name for name, _ in model.named_buffers())
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for name, kind in _stored_kinds(files):
        buffer = name.endswith(buffers) or any(known.endswith(name) for known in buffers)
        if kind not in FLOATS and not buffer and not any(pattern.search(name) for pattern in ignored):
            raise ModelError(
                f"{where}: the tensor {name} is stored as {kind}; quantized weights are not supported: give the model "
                f"in float32, bfloat16 or float16"
            )


def _stored_kinds(files: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name and dtype of every tensor in the files."""
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, "pt") as opened:
                yield from ((name, opened.get_slice(name).get_dtype()) for name in opened.keys())
        else:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            yield from ((name, str(x.dtype)) for name, x in content.items() if isinstance(x, torch.Tensor))


def _in_backbone(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor belongs to the backbone, with or without its prefix."""
    first = name.partition(".")[0]
    return first == model.base_model_prefix or first in dict(model.base_model.named_children())


def refuse(where: str, what: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise `ModelError` that names missing and unexpected tensors of `what`, if there are any."""
    if missing:
        raise ModelError(f"{where}: it lacks the weights {_named(missing)} of {what}; {SAME_FOLDER}")
    if unexpected:
        raise ModelError(f"{where}: it holds {_named(unexpected)}, which {what} does not have; {SAME_FOLDER}")


def _named(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    first = sorted(names)[:NAMED]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
