"""The command line as a person meets it. SFT and reward model are trained once, into one `log_dir`."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import GPT2Config, GPT2LMHeadModel

from src.data.embedded.reviews import Reviews
from src.data.tokenizers import byte_level_bpe
from src.rewards.vader import Vader
from src.runs.start import start as run
from src.train import combinations
from src.utils.exits import JobFailedError, friendly_errors
from tests.wandb_files import wandb_records

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # peft, of GPT-2's Conv1D layers
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),  # Lightning, of very short runs
    pytest.mark.filterwarnings("ignore:Found .* in eval mode:UserWarning"),  # Lightning, of what is so by design
]

# ruff: noqa: E501, whole sentences stay on their line
ROOT = Path(__file__).parents[1]
FAST = ["experiment=quick", "trainer.accelerator=cpu"]
TINY = [*FAST, "ppo.num_iterations=2", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.epochs=1", "ppo.eval_prompts=8"]
FILES = (
    "config.yaml",
    "metrics.csv",
    "timing.csv",
    "result.json",
    "curves.png",
    "samples",
    "adapter",
    "model",
    "checkpoints",
)


def command(*overrides, module="src.train"):
    return [sys.executable, "-m", module, *overrides]


def start(*overrides, module="src.train", **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*overrides, module=module), cwd=ROOT, env=environment, **pipes, **options)


def finish(*overrides, module="src.train"):
    process = start(*overrides, module=module)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def folders(logs, *overrides):
    """The run folders of PPO whose command line held these overrides."""
    saved = {path.parent: list(OmegaConf.load(path).overrides) for path in sorted(logs.glob("ppo/*/config.yaml"))}
    return [folder for folder, held in saved.items() if set(overrides) <= set(held)]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    """A log_dir with one finished run; its SFT and reward model are found by every later run."""
    folder = tmp_path_factory.mktemp("logs")
    run([*TINY, "name=first", f"log_dir={folder}"])
    return folder


@pytest.fixture(scope="session")
def artifacts(logs):
    """(SFT model, reward model) that the first run trained."""
    return [str(next(logs.glob(f"artifacts/{stage}-*/model"))) for stage in ("sft", "reward")]


@pytest.fixture(scope="session")
def given(logs, artifacts):
    """Overrides that name both models, so that nothing is looked for."""
    return [*TINY, f"log_dir={logs}", f"model.path={artifacts[0]}", f"reward.path={artifacts[1]}"]


@pytest.fixture(scope="session")
def sweep(logs):
    """Two jobs in one process, each with wandb: (exit code, stdout, stderr, folders)."""
    answer = finish("-m", "ppo.clip=0.1,0.2", "seed=2", *TINY, "logger=wandb", f"log_dir={logs}")
    return *answer, folders(logs, "logger=wandb")


# ---------------------------------------------------------------------------------------------------- what a run leaves


@pytest.mark.slow
def test_a_sweep_runs_every_job_and_leaves_whole_folders(sweep, logs):
    code, _, err, made = sweep
    assert code == 0, err
    assert len(made) == 2
    for folder in made:
        assert [name for name in FILES if not (folder / name).exists()] == []
        assert len(rows(folder / "metrics.csv")) == len(rows(folder / "timing.csv")) == 2
    configs = [OmegaConf.load(folder / "config.yaml") for folder in made]
    assert sorted((c.ppo.clip, c.seed) for c in configs) == [(0.1, 2), (0.2, 2)]
    assert len(list(logs.glob("artifacts/*.tmp"))) == 0
    assert len([a for a in (logs / "artifacts").iterdir() if a.is_dir()]) == 2  # trained once for all of them


def test_the_jobs_of_a_sweep_are_known_before_the_first_one_unless_hydra_finds_them_later():
    assert combinations(["ppo.clip=0.1,0.2", "seed=3", "hydra/launcher=basic"]) == [
        ["ppo.clip=0.1", "seed=3"],
        ["ppo.clip=0.2", "seed=3"],
    ]
    for later in ("kl_estimator=glob(*)", "hydra/sweeper=other", "hydra.sweeper.params={seed: 1}"):
        assert combinations(["ppo.clip=0.1,0.2", later]) == []


@pytest.mark.slow
def test_a_repeated_sweep_runs_no_job_again(sweep, logs):
    code, out, err = finish("-m", "ppo.clip=0.1,0.2", "seed=2", *TINY, "logger=wandb", f"log_dir={logs}")
    assert code == 0, err
    assert [f"finished before: {folder}\n" in out for folder in sweep[3]] == [True] * 2
    assert folders(logs, "logger=wandb") == sweep[3]


@pytest.mark.slow
def test_a_bad_job_of_a_sweep_leaves_the_others_their_results(given, artifacts, logs):
    plain = [override for override in given if not override.startswith("model.path=")]
    code, _, err = finish("-m", f"model.path={logs}/nowhere,{artifacts[0]}", "ppo.clip=0.3", *plain)
    assert code == 2
    assert f"no usable model at '{logs}/nowhere'" in err
    assert "Traceback" not in err
    (other,) = folders(logs, "ppo.clip=0.3")
    assert (other / "result.json").exists()


def wandb_history(folder):
    """Everything an offline wandb run has logged: key -> list of values."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    history = {}
    for record in wandb_records(file):
        for item in record.history.item:
            key = item.key or ".".join(item.nested_key)
            history.setdefault(key, []).append(json.loads(item.value_json))
    return history


@pytest.mark.slow
def test_wandb_offline_holds_numbers_and_samples(sweep):
    for folder in sweep[3]:  # a run of its own for each job
        history = wandb_history(folder)
        for key in ("rollout/score", "rollout/kl", "policy/loss", "critic/loss"):
            mine = [float(row[key]) for row in rows(folder / "metrics.csv")]
            assert history[key] == pytest.approx(mine)
        tables = list(folder.glob("wandb/offline-run-*/files/media/table/samples_*.table.json"))
        assert history["samples._type"][-1] == "table-file"
        assert history["samples.nrows"][-1] == 16  # 8 of each iteration
        assert tables
        newest = json.loads(max(tables, key=lambda path: path.stat().st_mtime).read_text())
        assert newest["columns"] == ["iteration", "prompt", "response", "score", "finished"]
        assert {row[0] for row in newest["data"]} == {1, 2}


def test_result_json_has_each_figure_with_n_and_interval(logs):
    folder = folders(logs, "name=first")[0]
    result = json.loads((folder / "result.json").read_text())
    groups = {"sft", "ppo", "improvement"}
    assert {"format", "stage", "seconds", "git_revision", "config_hash", "seed", *groups} <= set(result)
    assert result["format"] == 2
    named = {"score", "gold", "kl", "response_length", "eos_fraction", "grammatical", "distinct"}
    for group, names in (("sft", named), ("ppo", named), ("improvement", {"score", "gold"})):
        assert names <= set(result[group])
        assert {result[group]["n"][name] for name in names} == {8}
        for name in names - {"distinct"}:
            low, high = result[group]["interval"][name]
            assert low <= result[group][name] <= high
    assert result["sft"]["kl"] == 0
    assert result["improvement"]["score"] == pytest.approx(result["ppo"]["score"] - result["sft"]["score"])


def test_the_same_command_gives_the_same_numbers(given, logs):
    for _ in range(2):
        run([*given, "resume=never", "seed=7"])
    first, second = (folder / "metrics.csv" for folder in folders(logs, "seed=7"))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != (folders(logs, "name=first")[0] / "metrics.csv").read_bytes()


# -------------------------------------------------------------------------------------------------------- other models


def gpt2_folder(folder, vocab_size=None, **shape):
    """A GPT-2 with random weights and a byte-level BPE of its own."""
    tokenizer = byte_level_bpe(Reviews(Vader(), n_reviews=2400, n_pairs=10).texts("train"), vocab_size=400)
    config = GPT2Config(
        vocab_size=vocab_size or len(tokenizer), bos_token_id=1, eos_token_id=1, pad_token_id=0, **shape
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_gpt2_folder_trains(tmp_path, logs):
    folder = gpt2_folder(tmp_path / "gpt2", n_layer=2, n_head=2, n_embd=32, n_positions=128)
    before = set((logs / "artifacts").iterdir())
    result = run([*TINY, "model=gpt2", f"model.path={folder}", "ppo.clip=0.2", f"log_dir={logs}"])
    assert result["ppo"]["n"]["score"] == 8
    assert set((logs / "artifacts").iterdir()) == before  # the embedded reward model serves any policy
    (made,) = folders(logs, "model=gpt2")
    assert len(rows(made / "metrics.csv")) == 2
    assert json.loads((made / "model/config.json").read_text())["n_embd"] == 32


@pytest.mark.slow
def test_gpt2_small_trains_within_6_gib(tmp_path, logs):
    folder = gpt2_folder(tmp_path / "gpt2", vocab_size=50257)  # the shape of GPT-2 small: 124M parameters
    sizes = ["ppo.num_iterations=1", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=2"]
    lengths = [
        "rollout.max_prompt_tokens=16",
        "rollout.max_new_tokens=24",
        "rollout.scoring_batch_size=8",
        "ppo.eval_prompts=8",
        "ppo.epochs=1",
    ]
    overrides = [*FAST, *sizes, *lengths, "model=gpt2", f"model.path={folder}", "ppo.clip=0.2", f"log_dir={logs}"]
    process = start(*overrides, "name=gpt2_small")
    err = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    process.stderr.close()
    assert process.returncode == 0, err
    assert usage.ru_maxrss * 1024 <= 6 * 2**30
    assert len(rows(logs / "ppo/gpt2_small/metrics.csv")) == 1


# ------------------------------------------------------------------------------------------------- stopping and going on


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_and_the_same_command_goes_on(given, logs):
    overrides = [*given, "ppo.num_iterations=40", "callbacks.checkpoint.every=1", "name=stopped"]
    folder = logs / "ppo/stopped"
    process = start(*overrides)
    deadline = time.time() + 120
    while not any(folder.glob("checkpoints/*.ckpt")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    words = " ".join((out + err).split())
    assert "interrupted" in words
    assert "the same command resumes" in words
    assert not (folder / "result.json").exists()
    kept = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
    assert kept.name in words.replace(" ", "")
    code, _, err = finish(*overrides)
    assert code == 0, err
    assert [int(row["step"]) for row in rows(folder / "metrics.csv")] == list(range(1, 41))
    assert (folder / "result.json").exists()
    run([*overrides[:-1], "name=whole"])
    assert (folder / "metrics.csv").read_bytes() == (logs / "ppo/whole/metrics.csv").read_bytes()


def test_an_unfinished_run_is_gone_on_with_by_the_same_settings_only(given, logs):
    shutil.copytree(logs / "ppo/first", logs / "ppo/half")
    (logs / "ppo/half/result.json").unlink()
    refused = refusal([*given, "name=half", "ppo.clip=0.4"])
    assert "iteration-2.ckpt was made with other settings, and these change results: ppo.clip (0.2 -> 0.4)" in refused
    run([*given, "name=half"])  # nothing is left to learn: the same result once more
    for name in ("metrics.csv", "model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (logs / "ppo/half" / name).read_bytes() == (logs / "ppo/first" / name).read_bytes()


@pytest.mark.slow
def test_a_run_starts_from_the_checkpoint_of_another(given, logs):
    longer = ["ppo.lr_schedule=constant_with_warmup", "ppo.num_iterations=4", f"resume={logs / 'ppo/constant'}"]
    run([*given, "ppo.lr_schedule=constant_with_warmup", "name=constant"])
    run([*given, "ppo.lr_schedule=constant_with_warmup", "ppo.num_iterations=4", "name=whole4"])
    run([*given, *longer, "name=longer"])
    for name in ("metrics.csv", "model/model.safetensors"):
        assert (logs / "ppo/longer" / name).read_bytes() == (logs / "ppo/whole4" / name).read_bytes()
    assert "allow_config_change=true" in refusal([*given, *longer, "name=other", "seed=5"])


# ------------------------------------------------------------------------------------------------------------ bad input


def refusal(overrides):
    """The sentence that these overrides are refused with."""
    with pytest.raises(BaseException) as stopped, friendly_errors(overrides, job_of_sweep=True):  # noqa: PT011
        run(overrides)
    assert isinstance(stopped.value, JobFailedError), repr(stopped.value)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


OUT_OF_RANGE = {
    "ppo.clip=0": "ppo.clip=0: must be greater than 0",
    "ppo.clip=-1": "ppo.clip=-1: must be greater than 0",
    "ppo.clip=1.5": "ppo.clip=1.5: must be less than 1",
    "ppo.gamma=1.2": "ppo.gamma=1.2: must be at most 1",
    "ppo.lam=-0.1": "ppo.lam=-0.1: must be at least 0",
    "ppo.epochs=0": "ppo.epochs=0: must be at least 1",
    "ppo.minibatch_size=999": "ppo.minibatch_size=999: must be at most ppo.batch_size (16)",
    "ppo.micro_batch_size=0": "ppo.micro_batch_size=0: must be at least 1",
    "ppo.num_iterations=0": "ppo.num_iterations=0: must be at least 1",
    "ppo.lr=-1": "ppo.lr=-1: must be at least 0",
    "ppo.kl_coef=-1": "ppo.kl_coef=-1: must be at least 0",
    "rollout.temperature=0": "rollout.temperature=0: must be greater than 0",
    "rollout.max_new_tokens=0": "rollout.max_new_tokens=0: must be at least 1",
    "rollout.max_new_tokens=60": "rollout.max_prompt_tokens (36) + rollout.max_new_tokens (60) may reach 96 tokens, but "
    "model 'tiny' reads at most 64; give rollout.max_new_tokens=28",
    "model.lora.rank=0": "model.lora.rank=0: must be at least 1",
    "model.lora.targets=[nonexistent]": "model.lora.targets=[nonexistent]: no layer of model 'tiny' is called nonexistent; "
    "all-linear adapts every linear layer",
    "model.dtype=int3": "model.dtype='int3': must be 'float32', 'bfloat16', 'float16' or 'float64'",
    "model.attn_implementation=x": "model.attn_implementation='x': must be 'sdpa', 'eager', 'flash_attention_2' or 'flash_attention_3'",
    "callbacks.checkpoint.every=0": "callbacks.checkpoint.every=0: must be at least 1",
    "trainer.devices=2": "trainer.devices=2: several processes need trainer=ddp",
    "trainer.devices=auto": "trainer.devices='auto': must be a whole number",
    "trainer=ddp trainer.num_nodes=2": "trainer.num_nodes=2: start the processes by torchrun or srun",
    "+trainer.strategy=fsdp": "trainer.strategy='fsdp': is not supported; several processes train by trainer=ddp or trainer=fsdp",
    "+trainer.strategy=deepspeed": "trainer.strategy='deepspeed': is not supported; several processes train by trainer=ddp or "
    "trainer=fsdp",
    "trainer=ddp trainer.devices=3": "ppo.batch_size=16: counts the rows of all processes together, so it must be a "
    "multiple of 3 (trainer.devices); these numbers of processes would do: 1, 2, 4, 8",
    "trainer=ddp ppo.minibatch_size=5": "ppo.minibatch_size=5: counts the rows of all processes together, so it must be "
    "a multiple of 2 (trainer.devices); these numbers of processes would do: 1",
    "stage=sft trainer=ddp sft.batch_size=5": "sft.batch_size=5: counts the rows of all processes together, so it must "
    "be a multiple of 2 (trainer.devices); these numbers of processes would do: 1, 5",
    "stage=sft sft.steps=0": "sft.steps=0: must be at least 1",
    "stage=sft sft.max_tokens=1000": "sft.max_tokens (1000) may reach 1000 tokens, but model 'tiny' reads at most 64; "
    "give sft.max_tokens=64",
    "stage=reward reward_model.max_tokens=1000": "reward_model.max_tokens=1000: the reward model reads at most 512 "
    "tokens; give reward_model.max_tokens=512",
}


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_a_value_out_of_range_names_key_value_and_range(override, tmp_path):
    assert refusal(["experiment=quick", *override.split(), f"log_dir={tmp_path}"]) == OUT_OF_RANGE[override]
    assert list(tmp_path.iterdir()) == []  # refused before anything was made


def test_a_model_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    base = ["experiment=quick", f"log_dir={tmp_path}/logs"]
    hub = refusal([*base, "model=gpt2"])
    assert "openai-community/gpt2" in hub
    assert "model.path=FOLDER" in hub
    assert "hf download openai-community/gpt2" in hub
    assert "no usable model at '/no/such/folder'" in refusal([*base, "model=gpt2", "model.path=/no/such/folder"])
    assert f"no usable model at '{tmp_path}/empty' (model.path)" in refusal([*base, f"model.path={tmp_path}/empty"])
    assert f"no usable model at '{tmp_path}/empty' (reward.path)" in refusal([*base, f"reward.path={tmp_path}/empty"])
    assert not (tmp_path / "logs").exists()


def test_a_language_model_is_no_reward_model(artifacts, tmp_path):
    said = refusal(["experiment=quick", f"reward.path={artifacts[0]}", f"log_dir={tmp_path}"])
    assert "there is a GPT2LMHeadModel, but a reward model is a sequence classifier with one output" in said


def test_data_that_cannot_be_read(tmp_path):
    base = ["data=movie_reviews", "stage=sft", f"log_dir={tmp_path}"]
    assert "data.path must be given" in refusal(base)
    assert "there is no file /no/such.jsonl" in refusal([*base, "data.path=/no/such.jsonl"])
    (tmp_path / "broken.jsonl").write_text('{"text": "a b c d e f", "rating": 1}\n{"text": broken\n')
    assert "broken.jsonl:2 is not valid JSON" in refusal([*base, f"data.path={tmp_path}/broken.jsonl"])


def test_a_log_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for stage in ("sft", "ppo"):
        said = refusal(["experiment=quick", f"stage={stage}", f"log_dir={tmp_path}/file"])
        assert said.startswith(f"log_dir={tmp_path}/file: cannot write to ")


def test_what_the_trainer_refuses(given):
    assert refusal([*given, "trainer.accelerator=nope"]).startswith("trainer: ")
    assert "foo" in refusal([*given, "+trainer.foo=1"])


@pytest.mark.parametrize(
    ("module", "override", "sentence"),
    [
        ("src.train", "ppo.clipp=0.1", "error: ppo.clipp=0.1: there is no key ppo.clipp; close to it: ppo.clip, "),
        pytest.param(
            *("src.pipeline", "policy_loss=nope", "error: policy_loss=nope: there is no such option; the options are "),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["train", "pipeline"],
)
def test_as_a_process_it_says_one_line_and_exits_with_2(module, override, sentence):
    code, out, err = finish(override, module=module)
    assert code == 2
    assert out == ""
    assert err.startswith(sentence)
    assert err.count("\n") == 1
