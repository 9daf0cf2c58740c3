"""The memory ledger beside what two PPO iterations really take, for GPT-2 shapes with random weights on a CPU.

    python -m benchmarks.memory

Each shape trains in a process of its own, one after the other: 16 prompts of 16 tokens, 48 new tokens, LoRA of rank 16
on every linear layer, one micro-batch of 16. Measured is the largest resident set less that after the imports; loading,
final comparison and saving are part of it. glibc keeps back much of what is freed, in pieces that later tensors do not
fit into, so each shape is measured twice: with blocks of 64 KiB and more given back at once (MALLOC_MMAP_THRESHOLD_),
which shows what tensors take, and as it comes. Writes benchmarks/results/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from src.config.compose import compose
from src.data.embedded.reviews import Reviews
from src.data.tokenizers import byte_level_bpe
from src.memory.__main__ import ledger_of
from src.rewards.vader import Vader
from src.runs.report import quiet_libraries
from src.train import train

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, int]] = {
    "GPT-2, 124M": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "GPT-2 medium, 355M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
}
SIZES = (
    "experiment=quick reward=vader model=gpt2 trainer.accelerator=cpu ppo.num_iterations=2 ppo.batch_size=16 "
    "ppo.minibatch_size=16 ppo.micro_batch_size=16 ppo.epochs=1 ppo.eval_prompts=4 rollout.scoring_batch_size=16 "
    "rollout.max_prompt_tokens=16 rollout.max_new_tokens=48 resume=never"
).split()
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
MIB = 2**20


def write_model(shape: dict[str, int], folder: Path) -> None:
    """A GPT-2 of that shape with random weights, the vocabulary of GPT-2 and a small tokenizer."""
    tokenizer = byte_level_bpe(Reviews(Vader(), n_reviews=2400, n_pairs=10).texts("train"), vocab_size=400)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=1, pad_token_id=0, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(model: str, log_dir: str) -> dict[str, float]:
    """Bytes in this process: what the ledger says, and the largest resident set less the present one."""
    config = compose([*SIZES, f"model.path={model}", f"log_dir={log_dir}"])
    config.run_dir = f"{log_dir}/run"
    said = ledger_of(config)
    quiet_libraries()
    before = psutil.Process().memory_info().rss
    train(config)
    return {"ledger": said.peak, "measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def in_child(shape: dict[str, int], environment: dict[str, str]) -> dict[str, Any]:
    """`measure` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, "-m", "benchmarks.memory", "--make", json.dumps(shape), folder]
        subprocess.run(make, check=True)
        command = [sys.executable, "-m", "benchmarks.memory", "--measure", folder]
        answer = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
    return json.loads(answer.stdout.splitlines()[-1])


def row(name: str, shape: dict[str, int]) -> str:
    """MiB, and how far off the ledger is."""
    tensors, plain = in_child(shape, RETURNED), in_child(shape, {})
    said = tensors["ledger"]
    cells = [f"{found / MIB:.0f} | {said / found:.2f}" for found in (tensors["measured"], plain["measured"])]
    return f"| {name} | {said / MIB:.0f} | {' | '.join(cells)} |"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", nargs=2, metavar=("SHAPE", "FOLDER"), help="used by this command itself")
    parser.add_argument("--measure", metavar="FOLDER", help="used by this command itself")
    arguments = parser.parse_args()
    if arguments.make:
        write_model(json.loads(arguments.make[0]), Path(arguments.make[1]) / "model")
    elif arguments.measure:
        print(json.dumps(measure(f"{arguments.measure}/model", arguments.measure)))
    else:
        head = "| shape | ledger (MiB) | measured (MiB) | ledger / measured | as it comes (MiB) | ledger / measured |"
        text = "\n".join([head, "|---" * 6 + "|", *(row(name, shape) for name, shape in SHAPES.items())])
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "memory.md").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
