"""Time a rollout: this project's sampler against transformers' generate, for GPT-2 small with random weights.

    python -m benchmarks.rollout

One thread on a CPU, 64 prompts of 16 to 47 tokens. The length of every response is fixed beforehand, for both alike:
generate stops by a stopping criterion, the sampler by its check after each token. generate keeps its logits, and
compute_transition_scores gives the log-probabilities. Both alternate; medians. Writes benchmarks/results/rollout.json
and rollout.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from src.kernels.fast_layers import with_fast_layers
from src.rollout.sampling import Sampler

RESULTS = Path(__file__).parent / "results"
ROWS, NEW = 64, 48
COLUMNS = ("case", "generate CPU s", "ours CPU s", "CPU ratio", "generate wall s", "ours wall s", "ours tokens/s")


@dataclass(frozen=True, kw_only=True)
class Scheduled(Sampler):
    """The sampler, with the length of each response (B,) fixed."""

    lengths: Tensor

    def _ended(self, token: Tensor, stop_ids: Tensor, rows: Tensor, step: int) -> Tensor:
        return self.lengths[rows] <= step + 1


@dataclass(frozen=True)
class AtLength(StoppingCriteria):
    """The same rule for generate."""

    prompt: int
    lengths: Tensor

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows (B,) have ended."""
        return input_ids.shape[1] - self.prompt >= self.lengths


@torch.no_grad()
def by_generate(lm: PreTrainedModel, ids: Tensor, mask: Tensor, lengths: Tensor) -> None:
    """Tokens and their log-probabilities from generate."""
    out = lm.generate(
        ids, attention_mask=mask.long(), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=int(lengths.max()),
        pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        stopping_criteria=StoppingCriteriaList([AtLength(ids.shape[1], lengths)]),
    )  # fmt: skip
    lm.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)


def by_engine(lm: PreTrainedModel, ids: Tensor, mask: Tensor, lengths: Tensor) -> None:
    """Tokens and their log-probabilities from this project's sampler."""
    draws = torch.Generator().manual_seed(0)
    Scheduled(int(lengths.max()), 1.0, lengths=lengths).sample(lm, ids, mask, torch.tensor([-1]), 0, draws)


def seconds(engine: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    engine(*arguments)
    return time.process_time() - cpu, time.perf_counter() - wall


def prompts(samples: int) -> tuple[Tensor, Tensor]:
    """ROWS left-padded prompts, each `samples` times."""
    draws = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 48, (ROWS // samples, 1), generator=draws)
    lengths[0] = 47
    mask = torch.arange(47) >= 47 - lengths
    ids = torch.where(mask, torch.randint(1, 50257, mask.shape, generator=draws), 0)
    return ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)


def measured(lm: PreTrainedModel, samples: int, lengths: Tensor, repeats: int) -> dict[str, Any]:
    """Medians of both, which alternate."""
    batch = (*prompts(samples), lengths)
    loaded = with_fast_layers(copy.deepcopy(lm))  # as this project loads it
    times = [(seconds(by_generate, lm, *batch), seconds(by_engine, loaded, *batch)) for _ in range(repeats)]
    (gen_cpu, gen_wall), (own_cpu, own_wall) = (
        [statistics.median(pair[engine][clock] for pair in times) for clock in (0, 1)] for engine in (0, 1)
    )
    return dict(
        zip(
            COLUMNS[1:],
            (gen_cpu, own_cpu, gen_cpu / own_cpu, gen_wall, own_wall, int(lengths.sum()) / own_cpu),
            strict=True,
        )
    )


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ragged = torch.randint(4, NEW + 1, (ROWS,))
    ragged[0] = NEW
    fixed = torch.full_like(ragged, NEW)
    shape = GPT2Config(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    cases = [("ragged 4..48", 1, ragged), ("fixed 48", 1, fixed), ("ragged 4..48, 4 per prompt", 4, ragged)]
    lm, found = GPT2LMHeadModel(shape).eval(), {}
    for dtype in (torch.float32, torch.bfloat16):
        lm = lm.to(dtype)
        for name, samples, lengths in cases:
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = measured(lm, samples, lengths, arguments.repeats)
    write(found)


def write(found: dict[str, dict[str, float]]) -> None:
    """Print the table and write JSON and Markdown."""
    rows = [[name, *(f"{row[column]:.2f}" for column in COLUMNS[1:])] for name, row in found.items()]
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rollout.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    lines = ["| " + " | ".join(row) + " |" for row in [list(COLUMNS), *rows]]
    lines.insert(1, "|---" * len(COLUMNS) + "|")
    (RESULTS / "rollout.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
