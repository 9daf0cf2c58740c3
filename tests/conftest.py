"""Tests run on one thread each, never reach for the network, and check the shapes of every call of `src.core`."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401 - the hook names it

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

torch.set_num_threads(1)

install_import_hook("src.core", "tests.shapes.checked")  # before any test imports it


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Whatever a test draws without a seed of its own is the same in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished PPO run of two iterations on a random GPT-2, judged by VADER: (run folder, SFT folder)."""
    import warnings

    from src.runs.start import start as run
    from tests.tiny import write_lm

    folder = tmp_path_factory.mktemp("tiny_run")
    base = write_lm(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's and Lightning's, filtered by name where they are looked at
        run([*TINY_RUN, f"model.path={base}", f"log_dir={folder}", "name=tiny"])
    return folder / "ppo" / "tiny", base


TINY_RUN = [
    *("experiment=quick", "model=gpt2", "reward=vader", "trainer.accelerator=cpu", "model.lora.rank=2"),
    *("ppo.num_iterations=2", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.epochs=1", "ppo.lr=0.05"),
    *("ppo.eval_prompts=6", "rollout.scoring_batch_size=4", "rollout.max_prompt_tokens=8", "rollout.max_new_tokens=6"),
    *("rollout.temperature=0.9", "data.n_pairs=10", "callbacks.checkpoint.every=1"),
]
