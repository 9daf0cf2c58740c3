"""Compare the memory estimate with two real PPO iterations, for the shapes of published models with random weights.

    python -m benchmarks.memory                        every shape
    python -m benchmarks.memory "Gemma 3 270M"         print the row of one

Each shape trains in a separate process on the CPU: LoRA of rank 16 on every linear layer, prompts of 16 tokens, all
rows of a batch in one micro-batch. Measured is the peak resident set minus that after the imports; loading, final
comparison and saving are included. glibc keeps much of the freed memory in pieces that later tensors do not fit into,
so each shape is measured twice: with blocks of 64 KiB or more returned at once (MALLOC_MMAP_THRESHOLD_), which shows
the memory of the tensors, and as a user's run is. Writes benchmarks/results/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src.config.compose import compose
from src.config.schema import PPORun
from src.data.embedded.reviews import Reviews
from src.data.tokenizers import byte_level_bpe
from src.memory.report import estimate_of
from src.models.settings import DTYPES
from src.rewards.vader import Vader
from src.runs.start import train
from src.utils.output import set_up_output

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """A published model's configuration, and the sizes of a batch."""

    model_type: str
    sizes: dict[str, Any]
    dtype: str = "float32"
    rows: int = 16
    response: int = 48

    @property
    def overrides(self) -> list[str]:
        """The command line of its run."""
        return [
            f"model.dtype={self.dtype}", f"rollout.max_new_tokens={self.response}", f"ppo.batch_size={self.rows}",
            f"ppo.minibatch_size={self.rows}", f"ppo.micro_batch_size={self.rows}",
            f"rollout.scoring_batch_size={self.rows}",
        ]  # fmt: skip


SMOLLM = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "GPT-2 124M": Shape("gpt2", {}),
    "GPT-2 medium 355M": Shape("gpt2", {"n_layer": 24, "n_head": 16, "n_embd": 1024}),
    "SmolLM2 135M, long": Shape("llama", SMOLLM, "bfloat16", rows=8, response=496),
    "Gemma 3 270M": Shape(
        "gemma3_text",
        {
            "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        },
        "bfloat16",
    ),
    "Qwen2.5 0.5B": Shape(
        "qwen2",
        {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
        "bfloat16",
    ),
    "Llama 3.2 1B": Shape(
        "llama",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        },
        "bfloat16",
    ),
}  # fmt: skip
SIZES = (
    "experiment=quick reward=vader model=gpt2 trainer.accelerator=cpu ppo.num_iterations=2 ppo.epochs=1 "
    "ppo.eval_prompts=4 rollout.max_prompt_tokens=16 resume=never"
).split()
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
HEAD = "| shape | batch | estimate (MiB) | tensors (MiB) | estimate / tensors | process (MiB) | estimate / process |"
MIB = 2**20


def write_model(shape: Shape, folder: Path) -> None:
    """Write a model of that shape with random weights and a small tokenizer."""
    tokenizer = byte_level_bpe(Reviews(Vader(), n_reviews=2400, n_pairs=10).texts("train"), vocab_size=400)
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.model_type, bos_token_id=1, eos_token_id=1, pad_token_id=0, **shape.sizes)
    AutoModelForCausalLM.from_config(config, dtype=DTYPES[shape.dtype]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(shape: Shape, folder: str) -> dict[str, float]:
    """Bytes in this process: the estimate, and the peak resident set minus the present one."""
    config = compose([*SIZES, *shape.overrides, f"model.path={folder}/model", f"log_dir={folder}"])
    assert isinstance(config, PPORun)
    estimated = estimate_of(config)
    set_up_output()
    before = psutil.Process().memory_info().rss
    train(config.model_copy(update={"run_dir": f"{folder}/run"}))
    return {"estimate": estimated.peak, "measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def in_child(name: str, environment: dict[str, str]) -> dict[str, Any]:
    """`measure` in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.memory", name, "--folder", folder]
        subprocess.run([*command, "--make"], check=True)
        answer = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
    return json.loads(answer.stdout.splitlines()[-1])


def row(name: str) -> str:
    """MiB, and the estimate divided by the measurement."""
    shape, tensors, plain = SHAPES[name], in_child(name, RETURNED), in_child(name, {})
    estimated = tensors["estimate"]
    cells = [f"{found / MIB:.0f} | {estimated / found:.2f}" for found in (tensors["measured"], plain["measured"])]
    batch = f"{shape.dtype}, {shape.rows} x {shape.response}"
    return f"| {name} | {batch} | {estimated / MIB:.0f} | {' | '.join(cells)} |"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, help="one of %(choices)s")
    parser.add_argument("--folder", help="internal: measure in this process the model of this folder")
    parser.add_argument("--make", action="store_true", help="internal: write that model")
    arguments = parser.parse_args()
    if arguments.make:
        write_model(SHAPES[arguments.shape], Path(arguments.folder) / "model")
    elif arguments.folder:
        print(json.dumps(measure(SHAPES[arguments.shape], arguments.folder)))
    elif arguments.shape:
        print(row(arguments.shape))
    else:
        text = "\n".join([HEAD, "|---" * 7 + "|", *map(row, SHAPES)])
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "memory.md").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
