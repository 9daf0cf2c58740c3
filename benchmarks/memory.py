"""Compare the memory estimate with two real PPO iterations, for GPT-2 shapes with random weights on a CPU.

    python -m benchmarks.memory

Each shape trains in a separate process: 16 prompts of 16 tokens, 48 new tokens, LoRA of rank 16 on every linear layer,
one micro-batch of 16. Measured is the peak resident set minus that after the imports; loading, final comparison and
saving are included. glibc keeps much of the freed memory in pieces that later tensors do not fit into, so each shape is
measured twice: with blocks of 64 KiB or more returned at once (MALLOC_MMAP_THRESHOLD_), which shows the memory of the
tensors, and with glibc's defaults. Writes benchmarks/results/memory.md.
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
from src.config.schema import PPORun
from src.data.embedded.reviews import Reviews
from src.data.tokenizers import byte_level_bpe
from src.memory.report import estimate_of
from src.rewards.vader import Vader
from src.runs.start import train
from src.utils.output import set_up_output

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
    """Write a GPT-2 of that shape with random weights, the vocabulary of GPT-2 and a small tokenizer."""
    tokenizer = byte_level_bpe(Reviews(Vader(), n_reviews=2400, n_pairs=10).texts("train"), vocab_size=400)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=1, pad_token_id=0, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(model: str, log_dir: str) -> dict[str, float]:
    """Bytes in this process: the estimate, and the peak resident set minus the present one."""
    config = compose([*SIZES, f"model.path={model}", f"log_dir={log_dir}"])
    assert isinstance(config, PPORun)
    estimated = estimate_of(config)
    set_up_output()
    before = psutil.Process().memory_info().rss
    train(config.model_copy(update={"run_dir": f"{log_dir}/run"}))
    return {"estimate": estimated.peak, "measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def in_child(shape: dict[str, int], environment: dict[str, str]) -> dict[str, Any]:
    """`measure` in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, "-m", "benchmarks.memory", "--make", json.dumps(shape), folder]
        subprocess.run(make, check=True)
        command = [sys.executable, "-m", "benchmarks.memory", "--measure", folder]
        answer = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
    return json.loads(answer.stdout.splitlines()[-1])


def row(name: str, shape: dict[str, int]) -> str:
    """MiB, and the estimate divided by the measurement."""
    tensors, plain = in_child(shape, RETURNED), in_child(shape, {})
    estimated = tensors["estimate"]
    cells = [f"{found / MIB:.0f} | {estimated / found:.2f}" for found in (tensors["measured"], plain["measured"])]
    return f"| {name} | {estimated / MIB:.0f} | {' | '.join(cells)} |"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", nargs=2, metavar=("SHAPE", "FOLDER"), help="internal")
    parser.add_argument("--measure", metavar="FOLDER", help="internal")
    arguments = parser.parse_args()
    if arguments.make:
        write_model(json.loads(arguments.make[0]), Path(arguments.make[1]) / "model")
    elif arguments.measure:
        print(json.dumps(measure(f"{arguments.measure}/model", arguments.measure)))
    else:
        head = "| shape | estimate (MiB) | tensors (MiB) | estimate / tensors | process (MiB) | estimate / process |"
        text = "\n".join([head, "|---" * 6 + "|", *(row(name, shape) for name, shape in SHAPES.items())])
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "memory.md").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
