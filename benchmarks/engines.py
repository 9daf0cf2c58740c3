"""Time a rollout by three engines: this project's sampler, transformers' generate, and vLLM in a child process.

    .venv-vllm/bin/python -m benchmarks.engines

One thread on a CPU, float32, two shapes of about 30M parameters with random weights and heads of 64, 32 prompts of 16
to 47 tokens. The length of every response is fixed beforehand, for all engines alike: each has the longest, or they are
spread evenly from 4 to it. All give log-probabilities. The engines alternate; seconds are medians of CPU time, those of
vLLM's processes among them. Writes benchmarks/results/engines.json and engines.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.rollout import by_engine, by_generate, prompts
from src.kernels.fast_layers import with_fast_layers
from src.rollout.engines.vllm_options import arguments, environment, surrounded

RESULTS = Path(__file__).parent / "results"
ROWS, SHORTEST, LONGEST = 32, 4, (48, 512)
VOCABULARY, WIDTH, LAYERS, HEADS = 16384, 512, 8, 8
ENGINES = ("generate", "local", "vLLM")


def shapes() -> dict[str, PreTrainedModel]:
    """The models; heads that queries share are as in Qwen2.5 0.5B."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, **special)
    qwen2 = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 4, tie_word_embeddings=True, **special,
    )  # fmt: skip
    return {"GPT-2": GPT2LMHeadModel(gpt2).eval(), "Qwen2": Qwen2ForCausalLM(qwen2).eval()}


def vllm_of(lm: PreTrainedModel, folder: str) -> Any:
    """vLLM with this model, started as `engine=vllm` starts it."""
    from vllm import LLM

    lm.save_pretrained(folder)
    with surrounded(environment()):
        return LLM(model=folder, skip_tokenizer_init=True, **arguments("float32", 47 + max(LONGEST), cache_gb=1.0))


def by_vllm(llm: Any, ids: Tensor, mask: Tensor, lengths: Tensor) -> None:
    """Tokens and their log-probabilities from vLLM; its cache of prompts is emptied first."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    asked = [{"prompt_token_ids": row[kept.bool()].tolist()} for row, kept in zip(ids, mask, strict=True)]
    drawn = [
        SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, logprobs=0, detokenize=False, seed=row)
        for row, n in enumerate(lengths.tolist())
    ]
    answers = llm.generate(asked, drawn, use_tqdm=False)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == lengths.tolist()


def cpu_seconds(run: Callable[[], None]) -> float:
    """CPU seconds of this process and of its children."""
    before = _spent()
    run()
    return _spent() - before


def _spent() -> float:
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def measured(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The median CPU seconds of each engine; they alternate, after a warm-up each."""
    for run in runs.values():
        run()
    rounds = [{name: cpu_seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: statistics.median(one[name] for one in rounds) for name in runs}


def cases(longest: int) -> dict[str, Tensor]:
    """Lengths (ROWS,) of the responses."""
    ragged = torch.linspace(SHORTEST, longest, ROWS).round().long()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))
    return {f"fixed {longest}": torch.full((ROWS,), longest), f"ragged {SHORTEST} to {longest}": ragged[order]}


def measure(name: str, lm: PreTrainedModel, repeats: int) -> dict[str, dict[str, float]]:
    """Case -> CPU seconds by engine."""
    ids, mask = (part[:ROWS] for part in prompts(1))
    ids, found = ids.clamp(max=VOCABULARY - 1), {}
    with tempfile.TemporaryDirectory() as folder:
        llm = vllm_of(lm, folder)
        fast = with_fast_layers(type(lm).from_pretrained(folder).eval())  # as this project loads it
        for longest in LONGEST:
            for case, lengths in cases(longest).items():
                batch = (ids, mask, lengths)
                runs = (
                    partial(by_generate, lm, *batch),
                    partial(by_engine, fast, *batch),
                    partial(by_vllm, llm, *batch),
                )
                found[f"{name}, {case}"] = measured(dict(zip(ENGINES, runs, strict=True)), repeats)
                print(f"{name}, {case}", found[f"{name}, {case}"], flush=True)
        llm.llm_engine.engine_core.shutdown()
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: seconds of each engine, and how many times `generate` needs."""
    head = "| shape, tokens | generate (s) | local (s) | vLLM (s) | generate / local | generate / vLLM |"
    lines = [head, "|---" * 6 + "|"]
    for case, spent in found.items():
        times = [f"{spent[engine]:.2f}" for engine in ENGINES]
        ratios = [f"{spent['generate'] / spent[engine]:.2f}" for engine in ENGINES[1:]]
        lines.append("| " + " | ".join([case, *times, *ratios]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for name, lm in shapes().items():
        found |= measure(name, lm, repeats)
    (RESULTS / "engines.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "engines.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
