"""SFT, reward model and PPO from every architecture and in every experiment, by the commands that a user gives."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from src.config.compose import compose, with_value
from src.models.loading import load_tokenizer
from src.models.roles import build_roles
from src.pipeline import run_pipeline
from src.runs.start import start as run
from src.stages.objects import instantiate
from tests.data import sets
from tests.families import CHATS, CLASSES, write_family
from tests.tiny import FOREIGN_WARNINGS, assert_rows_close, plain_logprobs, ragged_rollout, rows_of

pytestmark = [
    *FOREIGN_WARNINGS,
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),  # Lightning, of short runs
]
SHORT = [
    "trainer.accelerator=cpu",
    "sft.steps=2", "sft.batch_size=4", "sft.eval_rows=4", "sft.lr=1e-2", "sft.warmup=0",
    "reward_model.steps=2", "reward_model.batch_size=4", "reward_model.normalization_samples=4",
    "reward_model.normalization_max_new_tokens=4", "reward_model.warmup=0",
    "ppo.num_iterations=2", "ppo.batch_size=4", "ppo.minibatch_size=4", "ppo.micro_batch_size=2", "ppo.eval_prompts=4",
    "ppo.epochs=2", "ppo.critic_warmup=0", "ppo.lr=1e-3", "rollout.max_new_tokens=6", "rollout.scoring_batch_size=4",
]  # fmt: skip
EXPERIMENTS = {  # experiment -> model and set
    "imdb_gpt2": ("gpt2", "imdb"),
    "tldr_pythia": ("pythia-160m", "tldr"),
    "hh_qwen": ("qwen2.5-0.5b-instruct", "hh_rlhf"),
    "gsm8k_qwen": ("qwen2.5-0.5b-instruct", "gsm8k"),
}


def pair_file(folder: Path) -> Path:
    rows = [{"q": f"What is {i} and {i}?", "good": f"It is {2 * i}.", "bad": "No."} for i in range(30)]
    return sets.write_rows(folder / "pairs.jsonl", rows)


def own_data(folder: Path, family: str) -> list[str]:
    """The overrides for a file of pairs of one's own, as chats where the model has a chat template."""
    columns = ["data.columns.prompt=q", "data.columns.chosen=good", "data.columns.rejected=bad"]
    chat = ["data.chat=true"] if family in CHATS else []
    return ["data=custom", with_value("data.path", str(pair_file(folder))), *columns, *chat]


def assert_trained(folder: Path, reward_stage: bool) -> None:
    """Every stage left a model and finite figures, and PPO moved the policy."""
    stages = ("sft", "reward", "ppo") if reward_stage else ("sft", "ppo")
    for stage in stages:
        assert (folder / stage / "model/config.json").is_file()
        account = json.loads((folder / stage / "data.json").read_text())
        assert account["train"]["kept"] > 0
    assert (folder / "reward").exists() == reward_stage
    with (folder / "ppo/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert float(rows[0]["rollout/kl"]) == 0.0  # checklist 33: the policy starts as the reference
    before, after = (AutoModelForCausalLM.from_pretrained(folder / stage / "model") for stage in ("sft", "ppo"))
    moved = [name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert moved


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(CLASSES))
def test_every_architecture_goes_the_whole_way(family: str, tmp_path: Path) -> None:
    """Checklist 33. SFT, reward model and two iterations of PPO."""
    model = write_family(tmp_path / "hub", family)
    data, folder = own_data(tmp_path, family), with_value("log_dir", str(tmp_path / "logs"))
    lengths = ["sft.max_tokens=128", "rollout.max_prompt_tokens=64"]
    run_pipeline(
        [
            "experiment=none",
            f"model={family}",
            with_value("model.path", model),
            *data,
            *SHORT,
            *lengths,
            folder,
            "name=x",
        ]
    )
    assert_trained(tmp_path / "logs/pipeline/x", reward_stage=True)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS))
def test_every_experiment_for_the_hub_trains(experiment: str, tmp_path: Path) -> None:
    """With a small model of the architecture and a dozen rows of the set's schema in place of the hub's."""
    family, name = EXPERIMENTS[experiment]
    overrides = [f"experiment={experiment}", *sets.write_set(tmp_path / "set", name), *SHORT]
    texts = [json.dumps(sets.gsm8k()), json.dumps(sets.tldr()), *(row["chosen"] for row in sets.hh_rlhf())]
    model = with_value("model.path", write_family(tmp_path / "hub", family, texts))
    folder = with_value("log_dir", str(tmp_path / "logs"))
    run_pipeline([*overrides, model, folder, "name=x"])
    assert_trained(tmp_path / "logs/pipeline/x", reward_stage=experiment in ("tldr_pythia", "hh_qwen"))


@pytest.mark.parametrize("family", ["gpt2", "llama-3.2-1b-instruct"])
def test_after_sft_with_an_adapter_the_reference_is_the_sft_model(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checklist 33. The KL to the reference starts at exactly 0, and the reference is not the bare base."""
    bare = write_family(tmp_path / "hub", family)
    data, folder = own_data(tmp_path, family), with_value("log_dir", str(tmp_path / "logs"))
    choice = ["experiment=none", f"model={family}", *data, folder]
    sft = [option for option in SHORT if option.startswith(("sft.", "trainer."))]
    run(["stage=sft", with_value("model.path", bare), *choice, *sft, "sft.max_tokens=128", "name=x"])
    tuned = str(tmp_path / "logs/sft/x/model")
    account = json.loads((tmp_path / "logs/sft/x/data.json").read_text())
    assert account["train"] == {"rows": 24, "kept": 24, "dropped": {}}
    assert f"{tmp_path / 'pairs.jsonl'}, train: 24 of 24 rows\n" in capsys.readouterr().out
    model = instantiate(compose([*choice, with_value("model.path", tuned)]).model, "model")
    assert model.lora is not None
    roles, rollout = build_roles(model, load_tokenizer(tuned), seed=1, critic=True), ragged_rollout()
    policy, reference = (roles.distribution(rollout, 1.0, role).logprobs() for role in ("policy", "reference"))
    assert torch.equal(policy, reference)
    own = plain_logprobs(AutoModelForCausalLM.from_pretrained(tuned), rollout)
    assert_rows_close(rows_of(reference.detach(), rollout.response_mask), own, 1e-5)
    base = plain_logprobs(AutoModelForCausalLM.from_pretrained(bare), rollout)
    assert max(abs(a - b) for x, y in zip(own, base, strict=True) for a, b in zip(x, y, strict=True)) > 1e-2
