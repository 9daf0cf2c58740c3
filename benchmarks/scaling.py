"""Cost of a policy update against length, batch size, vocabulary and width, with random weights on a CPU.

    python -m benchmarks.scaling

An update is forward and backward of one micro-batch: log-probabilities and entropies of the second half of every
sequence, LoRA of rank 16 on every linear layer, GPT-2's architecture with 2 layers, one thread. Seconds per token are
the median of three passes; attention is timed separately by PyTorch's profiler. Memory is the peak of live tensors,
counted as they are allocated and freed, without the weights. Writes benchmarks/results/scaling.json and scaling.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import profile
from transformers import GPT2Config, GPT2LMHeadModel

from src.kernels.fast_layers import with_fast_layers
from src.memory.estimate import peak_of
from src.models.adapters import add_adapter
from src.models.distribution import TokenDistribution
from src.models.forward import hidden_states
from src.models.settings import LoraSettings

RESULTS = Path(__file__).parent / "results"
REPEATS = 3
COLUMNS = ("sweep", "rows", "tokens each", "vocabulary", "width", "us / token without attention", "attention", "MiB")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a micro-batch."""

    rows: int = 16
    tokens: int = 128
    vocabulary: int = 50257
    width: int = 768


SWEEPS: dict[str, list[Shape]] = {
    "length, 2048 tokens": [Shape(2048 // tokens, tokens) for tokens in (64, 128, 256, 512, 1024)],
    "batch": [Shape(rows) for rows in (1, 2, 4, 8, 16, 32)],
    "vocabulary": [Shape(vocabulary=2**power) for power in (15, 16, 17, 18)],
    "width": [Shape(width=width) for width in (256, 512, 768, 1024)],
}


def policy(shape: Shape) -> GPT2LMHeadModel:
    """A frozen model with a trainable adapter."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=shape.width, n_head=shape.width // 64, vocab_size=shape.vocabulary, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    lm = with_fast_layers(GPT2LMHeadModel(config).eval())
    add_adapter(lm, LoraSettings(rank=16, alpha=32, dropout=0.0, targets="all-linear", layers=None), "policy")
    return lm


def updating(shape: Shape) -> Callable[[], None]:
    """A function that runs one micro-batch forward and backward."""
    lm = policy(shape)
    ids = torch.randint(1, shape.vocabulary, (shape.rows, shape.tokens))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    response = slice(shape.tokens // 2, None)

    def update() -> None:
        hidden = hidden_states(lm, ids, everywhere)[:, shape.tokens // 2 - 1 : -1]
        actions: Tensor = ids[:, response]
        distribution = TokenDistribution(
            hidden.flatten(0, 1), lm.get_output_embeddings(), actions.flatten(), everywhere[:, response], 1.0
        )
        logprobs, _ = distribution.logprobs_and_entropy(entropy_trains=False)
        logprobs.sum().backward()
        lm.zero_grad()

    return update


def measured(shape: Shape) -> dict[str, float]:
    """Seconds per token without attention and in attention, and bytes."""
    update = updating(shape)
    update()
    whole, attention = [], []
    for _ in range(REPEATS):
        with profile() as profiler:
            since = time.perf_counter()
            update()
            whole.append(time.perf_counter() - since)
        events = profiler.key_averages()
        attention.append(sum(e.self_cpu_time_total for e in events if "attention" in e.key) / 1e6)
    tokens = shape.rows * shape.tokens
    spent = statistics.median(attention)
    return {
        "seconds_per_token": (statistics.median(whole) - spent) / tokens,
        "attention_seconds_per_token": spent / tokens,
        "bytes": peak_of(update),
    }


def main() -> None:
    """Entry of the command line."""
    torch.set_num_threads(1)
    found, rows = [], []
    for sweep, shapes in SWEEPS.items():
        for shape in shapes:
            took = measured(shape)
            found.append({"sweep": sweep, **asdict(shape), **took})
            us = [f"{took[key] * 1e6:.0f}" for key in ("seconds_per_token", "attention_seconds_per_token")]
            sizes = [str(value) for value in asdict(shape).values()]
            rows.append([sweep, *sizes, *us, f"{took['bytes'] / 2**20:.0f}"])
            print(" ".join(rows[-1]), flush=True)
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scaling.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = ["| " + " | ".join(row) + " |" for row in [list(COLUMNS), *rows]]
    lines.insert(1, "|---" * len(COLUMNS) + "|")
    (RESULTS / "scaling.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
