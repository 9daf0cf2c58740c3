"""Compare the plan's seconds with real PPO iterations that the rates were not fitted to: `python -m benchmarks.plan`.

Measures this machine's rates (`src.plan.measure`), then trains each configuration for three iterations on one thread,
of which the first warms up. CPU seconds of the process, so that other programs count little. No response ends early.
`--rates FILE` uses rates that were measured before. Writes benchmarks/results/plan.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.compare.workload import PHASES
from benchmarks.kept_clock import KeptClock
from benchmarks.provenance import provenance
from src.config.compose import compose
from src.config.schema import PPORun
from src.data.tokenizers import word_level
from src.memory.report import estimate_of
from src.plan.iteration import OPTIMIZER, ROLLOUT, SCORING, TRAINING, iteration
from src.plan.machine import Machine
from src.plan.measure import machine
from src.plan.read import dtype_of, roles_of, sizes_of
from src.plan.report import Forecast, forecast
from src.runs.start import train
from src.utils.output import set_up_output

RESULTS = Path(__file__).parent / "results"
CLOCK = "+callbacks.clock._target_=benchmarks.kept_clock.KeptClock"
WORDS = 96  # in the tokenizer; models have more
ITERATIONS = 3


@dataclass(frozen=True)
class Case:
    """A model's shape and the run's settings; all differ from the probes of `src.plan.measure`."""

    name: str
    kind: str
    sizes: dict[str, Any]
    settings: str
    prompt: int  # tokens of the longest prompt; the shortest has half of them
    response: int
    rows: int = 16

    def overrides(self, folder: Path) -> list[str]:
        """The command line of its run."""
        return [
            *"experiment=none data=custom data.columns.prompt=prompt model=gpt2 gold_reward=none reward=length".split(),
            *"resume=never trainer.accelerator=cpu ppo.eval_prompts=1 ppo.minibatch_size=8 ppo.epochs=2".split(),
            *(f"data.path={folder}/train.jsonl", f"model.path={folder}/model", f"log_dir={folder}"),
            *(f"data.splits.{split}={folder}/{split}.jsonl" for split in ("validation", "test")),
            *(f"ppo.batch_size={self.rows}", f"rollout.max_prompt_tokens={self.prompt}"),
            *(f"rollout.max_new_tokens={self.response}", f"ppo.num_iterations={ITERATIONS}", CLOCK),
            *self.settings.split(),
        ]


GPT2 = {"n_layer": 4, "n_embd": 384, "n_head": 6, "vocab_size": 8000}
NARROW = {
    "num_hidden_layers": 4, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 6000, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "num_hidden_layers": 3, "hidden_size": 640, "intermediate_size": 1728, "num_attention_heads": 10,
    "num_key_value_heads": 5, "vocab_size": 3000,
}  # fmt: skip
CASES = (
    Case("GPT-2, LoRA, all layers", "gpt2", GPT2, "", 32, 32),
    Case("GPT-2, LoRA, top 1 of 4 layers, bfloat16", "gpt2", GPT2, "model.lora.layers=1 model.dtype=bfloat16", 32, 32,
         rows=64),
    Case("GPT-2, every weight", "gpt2", GPT2, "model.lora=null", 24, 24),
    Case("Small Llama, LoRA, long responses", "llama", NARROW, "ppo.micro_batch_size=4", 16, 160, rows=8),
    Case("Small Llama, critic in the top layer, bfloat16", "llama", NARROW,
         "model.lora.critic_layers=1 model.dtype=bfloat16", 48, 24, rows=64),
    Case("Llama, LoRA, bfloat16", "llama", LLAMA, "model.dtype=bfloat16 ppo.micro_batch_size=4", 24, 40),
    Case("Llama, LoRA, no critic, checkpointing", "llama", LLAMA,
         "advantage=rloo rollout.samples_per_prompt=2 model.gradient_checkpointing=true", 40, 16),
)  # fmt: skip


def write(case: Case, folder: Path) -> None:
    """The model with random weights, a tokenizer, and prompts of several lengths."""
    words = [f"w{i}" for i in range(WORDS)]
    tokenizer = word_level([" ".join(words)])
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.kind, **ids, **case.sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for start, (split, rows) in enumerate({"train": 64, "validation": 1, "test": 1}.items()):
        lengths = torch.linspace(case.prompt / 2, case.prompt, rows).round().int().tolist()
        texts = (" ".join(words[(70 * start + i + j) % WORDS] for j in range(n)) for i, n in enumerate(lengths))
        lines = [json.dumps({"prompt": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def compared(case: Case, rates: Machine) -> tuple[Forecast, dict[str, float]]:
    """Predicted seconds, and measured ones by phase: the medians of the iterations after the first."""
    with tempfile.TemporaryDirectory() as name:
        write(case, Path(name))
        run = compose(case.overrides(Path(name)))
        assert isinstance(run, PPORun)
        sizes = sizes_of(run, prompt=0.75 * case.prompt)
        found = forecast(rates, iteration(roles_of(run, estimate_of(run)), sizes), dtype_of(run))
        KeptClock.laps.clear()
        train(run.model_copy(update={"run_dir": f"{name}/run"}))
        kept = KeptClock.laps[1:]
    return found, {phase: statistics.median(lap[phase] for lap in kept) for phase in PHASES}


def row(case: Case, found: Forecast, seconds: dict[str, float]) -> str:
    """One line of the table."""
    predicted = {
        "rollout": found.of(ROLLOUT),
        "score": found.of(SCORING),
        "train": found.of(TRAINING) + found.of(OPTIMIZER),
    }
    total = sum(seconds.values())
    phases = [f"{predicted[phase]:.2f} / {seconds[phase]:.2f}" for phase in PHASES]
    cells = [case.name, f"{case.rows} x ({case.prompt} + {case.response})", *phases, f"{found.total:.2f} / {total:.2f}"]
    return "| " + " | ".join([*cells, f"{found.total / total - 1:+.0%}"]) + " |"


HEAD = """# Predicted and measured seconds of a PPO iteration

{provenance} CPU seconds; predicted / measured. `python -m benchmarks.plan`; docs/plan.md explains it.

| configuration | rows x (longest prompt + response) | rollout (s) | score (s) | train (s) | iteration (s) | error |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, help="rates that src.plan.measure wrote; default: measure them now")
    given = parser.parse_args()
    torch.set_num_threads(1)
    set_up_output()
    rates = Machine.load(given.rates) if given.rates else machine("this machine", "python -m src.plan.measure")[0]
    rows = []
    for case in CASES:
        rows.append(row(case, *compared(case, rates)))
        print(rows[-1], flush=True)
    rates.save(RESULTS / "machine.json")
    (RESULTS / "plan.md").write_text(HEAD.format(provenance=provenance()) + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
