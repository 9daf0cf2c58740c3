"""Write docs/memory.md: what fits into 8, 16, 24 and 80 GB, by the estimate of `python -m src.plan`.

    python -m benchmarks.memory_tables

The shapes are those of public models' config.json; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from src.memory.estimate import MemoryEstimate, Workload, estimate
from src.models.settings import LoraSettings, ModelSettings

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
SIZES = (8, 16, 24, 80)  # GB, 10^9 bytes
RESERVE = 0.9  # of a card; the rest is for the driver, the allocator and the libraries
MODELS: dict[str, PretrainedConfig] = {
    "GPT-2 (124M)": GPT2Config(),
    "Qwen2.5 0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Llama 3.2 1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "Qwen2.5 7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
}  # fmt: skip
LOAD = Workload(rollout_rows=64, scoring_rows=16, update_rows=4, prompt_tokens=256, response_tokens=256)
WAYS = {
    "LoRA, float32": ("float32", True, False),
    "LoRA, bfloat16, checkpointing": ("bfloat16", True, True),
    "every weight, bfloat16, checkpointing": ("bfloat16", False, True),
}


def estimate_for(config: PretrainedConfig, way: str) -> MemoryEstimate:
    """Rank 16 on every linear layer, or every weight; a critic, no reward model."""
    dtype, lora, checkpointing = WAYS[way]
    adapter = LoraSettings(rank=16, alpha=32, dropout=0.0, targets="all-linear") if lora else None
    return estimate(config, ModelSettings("", "", dtype, "sdpa", checkpointing, adapter, None), (), LOAD, critic=True)


def page() -> str:
    """The page."""
    peaks = {model: {way: estimate_for(config, way).on_gpu for way in WAYS} for model, config in MODELS.items()}
    lines = [HEAD, "| model | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 1) + "|"]
    lines += [f"| {model} | {' | '.join(f'{p / 1e9:.1f}' for p in row.values())} |" for model, row in peaks.items()]
    for size in SIZES:
        lines += ["", f"## {size} GB", "", "| model | what fits |", "|---|---|"]
        for model, row in peaks.items():
            fits = [way for way, peak in row.items() if peak <= RESERVE * size * 1e9]
            lines.append(f"| {model} | {'; '.join(fits) or 'none of these'} |")
    return "\n".join([*lines, TAIL])


HEAD = f"""# Memory

    python -m src.plan model=gpt2 ppo.micro_batch_size=8

prints the memory of a PPO run by role and phase, before weights are loaded. The architecture is built on fake tensors,
which have shapes but no memory; each phase runs on them with the code of training, and the bytes that live at once are
counted (`src/memory/estimate.py`). A run of a large model prints the same table when it starts. This page is written by
`python -m benchmarks.memory_tables` from the same code; a test compares the two.

Peak in GB (10^9 bytes) on a GPU, with a critic and without a reward model: {LOAD.rollout_rows} responses sampled at a
time, {LOAD.scoring_rows} scored at a time, micro-batches of {LOAD.update_rows}; {LOAD.prompt_tokens} prompt and
{LOAD.response_tokens} response tokens; LoRA of rank 16 on every linear layer; Adam.
"""
TAIL = f"""
"Fits": the peak is at most {RESERVE:.0%} of the card. To make a run smaller, in this order: `ppo.micro_batch_size` and
`rollout.scoring_batch_size` (change no result), `model.gradient_checkpointing=true` (the same numbers, more time),
`model.dtype=bfloat16`, an estimator without a critic
(`advantage=rloo rollout.samples_per_prompt=4`).

## Accuracy

`python -m benchmarks.memory` compares the estimate with real iterations on a CPU
([results](../benchmarks/results/memory.md)): it is within 6 % of the tensors. A process needs more, as glibc keeps
freed memory in pieces that later tensors do not fit into: there 1.25 to 1.3 times the estimate.
`MALLOC_MMAP_THRESHOLD_=65536` returns that memory, at some cost in time. Not counted: libraries' workspaces, the
trainer's mixed precision, the PPO-ptx loss (`ppo.ptx_coef`), exact KLs. Saving copies the model to main memory, also
after training on a GPU.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
