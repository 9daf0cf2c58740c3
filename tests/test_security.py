"""Nothing that a folder or a configuration brings along is run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from src.chat.__main__ import open_talk
from src.checkpointing.checksum import seal
from src.checkpointing.resume import find_checkpoint
from src.config.compose import compose
from src.errors import CheckpointError, ConfigError, ModelError
from src.evaluate.__main__ import evaluate
from src.export.__main__ import export
from src.export.parity import compare
from src.models.loading import (
    build_tokenizer,
    load_causal_lm,
    load_config,
    load_reward_model,
    load_tokenizer,
    unmatched_targets,
)
from src.stages.builders import stage_of
from src.stages.objects import instantiate
from tests.tiny import EOS, FOREIGN_WARNINGS, TinyCorpus, model_settings, write_lm

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
    torch.save({"format": 2, "state_dict": Payload(tmp_path / "marker")}, tmp_path / "checkpoints/file.tmp")
    seal(tmp_path / "checkpoints/file.tmp", file)
    config = compose([f"resume={file}"] if given else [])
    config = config.model_copy(update={"run_dir": str(tmp_path / "other" if given else tmp_path)})
    with pytest.raises(CheckpointError, match=r"iteration-1\.ckpt holds more than tensors"):
        find_checkpoint(config, {})
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
    with pytest.raises(ModelError, match="no usable model") as refused:
        LOADERS[loader](str(folder))
    assert not (tmp_path / "marker").exists()
    how = "here it is never run" if loader == "reward model" else "model.trust_remote_code=true runs it"
    assert str(refused.value).endswith(f"it comes with its own code, and {how}")


OWN = """
import pathlib
from transformers import GPT2Config, GPT2LMHeadModel
pathlib.Path({marker!r}).touch()
class Config(GPT2Config):
    model_type = "own"
class Model(GPT2LMHeadModel):
    config_class = Config
"""


def write_own(folder: Path, marker: Path, model_type: str = "own") -> str:
    """A model whose classes are in a Python file beside its weights, which leaves a mark when it is run."""
    write_lm(folder)
    content = json.loads((folder / "config.json").read_text())
    content |= {"model_type": model_type, "architectures": ["Model"]}
    content["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "own.py").write_text(OWN.format(marker=str(marker)))
    return str(folder)


def test_code_that_is_named_per_model_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configuration, tokenizer, weights and LoRA targets of that model; by default it is one sentence before any."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    path, marker = write_own(tmp_path / "trusted_model", tmp_path / "marker"), tmp_path / "marker"
    arguments = ["stage=ppo", f"model.path={path}", "model.scratch=null", "reward=length", "rollout.max_new_tokens=8"]
    for trusted in (False, True):
        config = compose([*arguments, f"model.trust_remote_code={str(trusted).lower()}"])
        if not trusted:
            with pytest.raises(ModelError, match=r"model\.trust_remote_code=true runs it"):
                stage_of(config).check()
            assert not marker.exists()
    stage_of(config).check()
    assert marker.exists()
    settings = instantiate(config.model, "model")
    lm = load_causal_lm(settings)
    assert type(lm).__module__.startswith("transformers_modules.")
    assert build_tokenizer(settings, TinyCorpus()).eos_token_id == EOS
    assert unmatched_targets(load_config(path, trusted=True), ["c_attn", "nope"]) == ["nope"]


def test_code_of_the_model_is_run_for_chats_and_for_export_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer that writes chats and counts tokens, and the probe of export; by default it is one sentence."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    path = write_own(tmp_path / "own_model", tmp_path / "marker")
    (tmp_path / "own_model/tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Words", None]}, "eos_token": "[eos]", "pad_token": "[pad]"})
    )
    code = (tmp_path / "own_model/own.py").read_text()
    words = "from transformers import PreTrainedTokenizerFast\nclass Words(PreTrainedTokenizerFast):\n    pass\n"
    (tmp_path / "own_model/own.py").write_text(code + words)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"the film {i}", "a": "good"}) + "\n" for i in range(30)))
    chat = ["data=custom", "data.columns.prompt=q", "data.columns.response=a", "data.max_prompt_tokens=50"]
    arguments = ["stage=ppo", f"model.path={path}", "model.scratch=null", "reward=length", f"data.path={rows}", *chat]
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true runs it"):
        stage_of(compose(arguments)).corpus()
    assert len(stage_of(compose([*arguments, "model.trust_remote_code=true"])).corpus().prompts("train")) > 0
    source = tmp_path / "run"
    shutil.copytree(path, source / "model")
    with pytest.raises(ValueError, match="trust_remote_code"):
        compare(source, source / "model", None, scores=False)
    assert compare(source, source / "model", None, scores=False, trusted=True).difference == 0


def test_a_run_of_a_model_with_code_is_exported_by_consent_of_this_call(
    tiny_run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    folder, own = tmp_path / "run", Path(write_own(tmp_path / "own_model", tmp_path / "marker"))
    shutil.copytree(tiny_run[0], folder)
    (folder / "checksums.txt").unlink()
    for name in ("config.json", "own.py"):
        shutil.copy(own / name, folder / "model" / name)
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true runs it"):
        export(str(folder), f"{tmp_path}/out")
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "out").exists()
    export(str(folder), f"{tmp_path}/out", "null", ["model.trust_remote_code=true"])
    assert (tmp_path / "marker").exists()


def test_a_known_architecture_with_code_beside_it_runs_none(tmp_path: Path) -> None:
    """It needs none; also where a model is built from its configuration to look up LoRA targets."""
    path, marker = write_own(tmp_path / "known", tmp_path / "marker", "gpt2"), tmp_path / "marker"
    assert unmatched_targets(load_config(path), ["c_attn", "nope"]) == ["nope"]
    assert type(load_causal_lm(model_settings(path))).__module__.startswith("transformers.")
    assert not marker.exists()


def test_weights_with_a_payload_are_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_lm(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload(tmp_path / "marker")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no usable model"):
        load_causal_lm(model_settings(str(folder)))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("target", ["os.system", "subprocess.run", "builtins.exec"])
def test_a_configuration_calls_nothing_that_reaches_out(target: str) -> None:
    config = compose([f"+callbacks.mine._target_={target}"])
    with pytest.raises(ConfigError, match=f"{target}.*blocklisted"):
        stage_of(config)


PAYLOAD = (
    "import pathlib\npathlib.Path({marker!r}).touch()\ndef score(p, r, m): return [0.0] * len(r)\ndef make(): ...\n"
)


@pytest.fixture
def foreign(tiny_run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a run folder from somebody else, whose overrides and configuration name a module that leaves a mark."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "payload.py").write_text(PAYLOAD.format(marker=str(tmp_path / "marker")))

    def make(*overrides: str) -> Path:
        folder = tmp_path / "run"
        shutil.copytree(tiny_run[0], folder)
        content: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        run = compose([*content["overrides"], *overrides])
        OmegaConf.save(OmegaConf.create(run.plain()), folder / "config.yaml")
        (tmp_path / "p.txt").write_text("the film\n")
        return folder

    yield make
    sys.modules.pop("payload", None)


def unfinished(folder: Path) -> Path:
    (folder / "result.json").unlink()
    return folder


COMMANDS: dict[str, Callable[[Path, bool], Any]] = {
    "chat": lambda folder, trusted: open_talk(str(folder), [], trusted),
    "evaluate": lambda folder, trusted: evaluate(
        str(folder), [f"prompts={folder.parent}/p.txt", f"out={folder.parent}/out"], trusted
    ),
    "export": lambda folder, trusted: export(str(unfinished(folder)), f"{folder.parent}/out", "null", (), trusted),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_folder_runs_nothing_of_its_own_without_consent(
    command: str, foreign: Callable[..., Path], tmp_path: Path
) -> None:
    """The reward is refused in one sentence; callbacks are not made at all; with --trust-run the reward is."""
    folder = foreign("reward=function", "reward.target=payload.score", "+callbacks.z._target_=payload.make")
    with pytest.raises(ConfigError, match=r"reward\.function\._target_=payload\.score, .*add --trust-run"):
        COMMANDS[command](folder, False)
    assert not (tmp_path / "marker").exists()
    if command == "export":
        (folder / "result.json").touch()
    COMMANDS[command](folder, True)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_callbacks_of_a_run_folder_are_not_made(command: str, foreign: Callable[..., Path], tmp_path: Path) -> None:
    """No other command has a use for them: it does its work."""
    COMMANDS[command](foreign("+callbacks.z={_target_: payload.make}"), False)
    assert not (tmp_path / "marker").exists()
