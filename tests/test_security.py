"""Nothing that a folder or a configuration brings along is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.callbacks.sealed import CheckpointError, seal
from src.models.loading import ModelError, load_causal_lm, load_config, load_reward_model, load_tokenizer
from src.resume import start_of
from src.utils.config import ConfigError, compose, instantiate
from tests.tiny import FOREIGN_WARNINGS, model_settings, write_lm

pytestmark = FOREIGN_WARNINGS


class Payload:
    """What a pickle can do to those who open it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_the_payload_works(tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    torch.save(Payload(tmp_path / "marker"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("given", [False, True])
def test_a_checkpoint_with_a_payload_is_not_opened(given: bool, tmp_path: Path) -> None:
    """With a right checksum, as an attacker would give it; found in the run's own folder, or named by resume=PATH."""
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints/iteration-1.ckpt"
    torch.save({"format": 1, "state_dict": Payload(tmp_path / "marker")}, tmp_path / "checkpoints/file.tmp")
    seal(tmp_path / "checkpoints/file.tmp", file)
    config = compose([f"resume={file}"] if given else [])
    config.run_dir = str(tmp_path / "other" if given else tmp_path)
    with pytest.raises(CheckpointError, match=r"iteration-1\.ckpt holds more than tensors"):
        start_of(config)
    assert not (tmp_path / "marker").exists()


LOADERS: dict[str, Callable[[str], Any]] = {
    "configuration": load_config,
    "tokenizer": load_tokenizer,
    "language model": lambda path: load_causal_lm(model_settings(path)),
    "reward model": load_reward_model,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_the_code_in_a_model_folder_is_not_run(loader: str, tmp_path: Path) -> None:
    """Refused at once: transformers would ask on the terminal, and wait for an answer."""
    folder = tmp_path / "model"
    write_lm(folder)
    kinds = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoModel": "own.Model"}
    kinds["AutoModelForSequenceClassification"] = "own.Model"
    for file, own in {"config.json": kinds, "tokenizer_config.json": {"AutoTokenizer": ["own.T", None]}}.items():
        content = json.loads((folder / file).read_text())
        content |= {"model_type": "own", "auto_map": own} if file == "config.json" else {"auto_map": own}
        content.pop("tokenizer_class", None)
        (folder / file).write_text(json.dumps(content))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\nclass Config: ...\n")
    with pytest.raises(ModelError, match="no usable model"):
        LOADERS[loader](str(folder))
    assert not (tmp_path / "marker").exists()


def test_weights_with_a_payload_are_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_lm(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload(tmp_path / "marker")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no usable model"):
        load_causal_lm(model_settings(str(folder)))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("target", ["os.system", "subprocess.run", "builtins.exec"])
def test_a_configuration_calls_nothing_that_reaches_out(target: str, tmp_path: Path) -> None:
    config = compose([f"+callbacks.mine._target_={target}"])
    config.run_dir = str(tmp_path)
    with pytest.raises(ConfigError, match=f"{target}.*blocklisted"):
        instantiate(config.callbacks)
