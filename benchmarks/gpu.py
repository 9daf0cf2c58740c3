"""This project on a GPU: tests, decoding, PPO iterations and where their time goes.

    python -m benchmarks.gpu                            on a CUDA GPU: some minutes
    python -m benchmarks.gpu --device cpu --small       the same script with small sizes on a CPU

Writes gpu.json and gpu.md after each row: to benchmarks/results, a trial on a CPU or with small sizes to logs/gpu.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)

from benchmarks.compare.rate import bandwidth, best
from benchmarks.rollout import AtLength
from src.callbacks.rollout import RolloutCallback
from src.core.padding import pad_left
from src.data.modules import PromptData
from src.data.tokenizers import word_level
from src.memory.estimate import Workload, estimate
from src.models.loading import with_fast_layers
from src.models.roles import LoraRoles
from src.models.settings import LoraSettings, ModelSettings
from src.modules.ppo import PPOModule
from src.modules.settings import PPOSettings
from src.rollout import sampling
from src.rollout.experience import ExperienceMaker
from src.rollout.sampling import Sampler
from src.types import Corpus, PromptRow, Rollout

ROOT = Path(__file__).parents[1]
ABOUT = """The shapes of GPT-2 (124M) and Llama 3.2 (1B), random weights in bfloat16, 64 prompts of 64 to 255 tokens and
256 response tokens for each; no response ends early. An iteration: policy, critic and reference on one base with LoRA
of rank 16 on all linear layers, a reward without a model, 4 epochs of 4 minibatches, `bf16-mixed`; the last of 4.

The limits: decoding reads all weights once per step and each row's keys and values so far, at the rate of a copy;
training computes 4 operations per weight and token (frozen weights have no gradient; attention is not counted), at the
rate of a matrix product of 8192^3."""
LORA = LoraSettings(rank=16, alpha=32)
COLUMNS = {
    "decoding": (
        "shape", "engine", "first run (s)", "again (s)", "tokens / s", "ms / step", "share of the bandwidth limit",
        "peak GiB",
    ),
    "iterations": (
        "shape", "seconds", "rollout / score / train (s)", "response tokens / s", "rollout tokens / s",
        "decoding's share of the bandwidth", "training's share of the matrix product's rate", "peak GiB",
        "estimated GiB",
    ),
    "time by kernel": ("shape", "phase", "kernel", "ms", "share"),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Rows and tokens of the measurements."""

    rows: int = 64
    shortest: int = 64
    longest: int = 255
    new: int = 256
    minibatch: int = 16
    iterations: int = 4  # the first warms up

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, evenly from the shortest to the longest."""
        return [self.shortest + round(i * (self.longest - self.shortest) / (self.rows - 1)) for i in range(self.rows)]


SMALL = Sizes(rows=4, shortest=4, longest=11, new=6, minibatch=2, iterations=2)
SHAPES: dict[str, Callable[..., PretrainedConfig]] = {"GPT-2 124M": GPT2Config, "Llama 1B": LlamaConfig}
SHAPE: dict[str, dict[str, Any]] = {
    "GPT-2 124M": {
        "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 1024,
        "vocab_size": 50257,
    },
    "Llama 1B": {
        "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "max_position_embeddings": 4096,
        "vocab_size": 128256, "intermediate_size": 8192, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
}  # fmt: skip
SMALLER = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 64,
    "vocab_size": 600,
}  # fmt: skip


class Unending(Sampler):
    """The sampler, with responses that never end early."""

    def _ended(self, token: Tensor, stop_ids: Tensor, rows: Tensor, step: int) -> Tensor:
        return torch.zeros_like(token, dtype=torch.bool)


class Page:
    """The rows so far, written after each one."""

    def __init__(self, folder: Path, about: str) -> None:
        self.folder, self.about = folder, about
        self.tables: dict[str, list[list[str]]] = {}
        self.notes: list[str] = []

    def add(self, table: str, *cells: Any) -> None:
        """A row, also printed."""
        row = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(table, *row, sep=" | ", flush=True)
        self.tables.setdefault(table, []).append(row)
        self.write()

    def note(self, line: str) -> None:
        """A line below the title."""
        print(line, flush=True)
        self.notes.append(line)
        self.write()

    def write(self) -> None:
        """Write both files."""
        lines = ["# On a GPU", "", self.about, *(f"\n- {note}" for note in self.notes)]
        for name, rows in self.tables.items():
            lines += ["", f"## {name.capitalize()}", "", *(f"| {' | '.join(row)} |" for row in [COLUMNS[name], *rows])]
            lines.insert(len(lines) - len(rows), "|---" * len(COLUMNS[name]) + "|")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        found = {"notes": self.notes} | {
            name: [dict(zip(COLUMNS[name], row, strict=True)) for row in rows] for name, rows in self.tables.items()
        }
        (self.folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Bench:
    """The measurements on one device."""

    device: str
    small: bool
    page: Page

    @cached_property
    def sizes(self) -> Sizes:
        """Rows and tokens."""
        return SMALL if self.small else Sizes()

    @cached_property
    def rates(self) -> tuple[float, float]:
        """The best rates: operations of a bfloat16 matrix product and bytes of a copy, per second."""
        product = max(best(torch.bfloat16, self.device).values())
        copied = bandwidth(self.device)
        self.page.note(f"Best rates: bfloat16 product {product / 1e12:.3g} TFLOP/s, copy {copied / 1e9:.4g} GB/s.")
        return product, copied

    def config(self, shape: str) -> PretrainedConfig:
        """The architecture; token 0 pads, 1 ends."""
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
        dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if shape.startswith("GPT") else {}
        return SHAPES[shape](**SHAPE[shape] | (SMALLER if self.small else {}), **ids, **dropout)

    def model(self, shape: str) -> PreTrainedModel:
        """Random weights in bfloat16 on the device."""
        torch.manual_seed(0)
        with torch.device(self.device):
            lm = AutoModelForCausalLM.from_config(self.config(shape), dtype=torch.bfloat16)
        return lm.eval()

    def synchronize(self) -> float:
        """Wait for the device; returns the time."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def peak(self, found: dict[str, float]) -> Iterator[None]:
        """Seconds and the largest memory of tensors, in GiB, into `found`."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = self.synchronize()
        yield
        found["seconds"] = self.synchronize() - began
        found["peak"] = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else float("nan")

    def prompts(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Prompts of random tokens, padded on the left."""
        draws = torch.Generator().manual_seed(1)
        rows = [torch.randint(2, vocabulary, (length,), generator=draws).tolist() for length in self.sizes.lengths]
        ids, mask = pad_left(rows, 0)
        return ids.to(self.device), mask.to(self.device)

    def decoded_bytes(self, config: PretrainedConfig, weights: int) -> int:
        """Bytes that decoding must read: all weights per step, and each row's keys and values so far."""
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = heads * config.hidden_size // config.num_attention_heads
        so_far = sum(prompt + token for prompt in self.sizes.lengths for token in range(1, self.sizes.new))
        return 2 * (weights * (self.sizes.new - 1) + 2 * config.num_hidden_layers * width * so_far)

    @torch.no_grad()
    def decode(self, shape: str) -> None:
        """Seconds of a rollout: replayed steps, plain steps, and generate of transformers."""
        plain, lm = self.model(shape), with_fast_layers(self.model(shape))
        weights = sum(p.numel() for p in lm.parameters())
        ids, mask = self.prompts(lm.config.vocab_size)
        new = self.sizes.new

        def ours(tokens: int, replayed: bool = True) -> None:
            kept = sampling.replayable
            if not replayed:
                sampling.replayable = lambda *_: False
            try:
                draws = torch.Generator(device=self.device).manual_seed(0)
                Unending(tokens).sample(lm, ids, mask, torch.tensor([1], device=self.device), 0, draws)
            finally:
                sampling.replayable = kept

        def generate(tokens: int) -> None:
            ends = AtLength(ids.shape[1], torch.full((len(ids),), tokens, device=self.device))
            out = plain.generate(
                ids, attention_mask=mask.long(), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=tokens,
                pad_token_id=0, eos_token_id=None, stopping_criteria=StoppingCriteriaList([ends]), output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            plain.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)

        engines: dict[str, Callable[[int], None]] = {
            "ours, replayed": ours,
            "ours, step by step": lambda tokens: ours(tokens, replayed=False),
            "generate": generate,
        }
        limit = self.decoded_bytes(lm.config, weights) / self.rates[1]
        for name, engine in engines.items():
            engine(4)
            found: list[dict[str, float]] = []
            for _ in range(2):  # a GPU's library prepares attention for each new shape, which takes some 50 ms
                found.append({})
                with self.peak(found[-1]):
                    engine(new)
            first, again = (run["seconds"] for run in found)
            self.page.add(
                "decoding", shape, name, first, again, self.sizes.rows * new / again, 1000 * again / new,
                limit / again, found[-1]["peak"],
            )  # fmt: skip
        if self.device == "cuda":
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                ours(new)
            self.kernels(shape, "rollout", seen)

    def kernels(self, shape: str, phase: str, seen: Any) -> None:
        """The kernels that take most of the time."""
        events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events)
        for event in events[:12]:
            name = event.key.replace("|", "/")[:90]
            own = event.self_device_time_total
            self.page.add("time by kernel", shape, phase, name, own / 1000, own / total)
        self.page.add("time by kernel", shape, phase, "all kernels", total / 1000, 1.0)

    def iterate(self, shape: str) -> None:
        """PPO iterations: policy, critic and reference on one base; the reward needs no model."""
        sizes, lm = self.sizes, self.model(shape)
        words = word_level([" ".join(f"w{i}" for i in range(lm.config.vocab_size - 3))])
        roles = LoraRoles(with_fast_layers(lm), words, LORA, False, True)
        settings = PPOSettings(minibatch_size=sizes.minibatch, micro_batch_size=sizes.minibatch)
        module = PPOModule(roles, EvenTokens(), settings)
        maker = ExperienceMaker(Unending(sizes.new), batch_size=sizes.rows // 2)
        clock = PhaseClock(self, maker)
        data = PromptData(
            Words(sizes.lengths), words, batch_size=sizes.rows, iterations=sizes.iterations,
            max_prompt_tokens=sizes.longest,
        )  # fmt: skip
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            max_epochs=1, callbacks=[RolloutCallback(maker), clock], precision="bf16-mixed", enable_model_summary=False,
            accelerator="gpu" if self.device == "cuda" else "cpu", **quiet,
        )  # fmt: skip
        trainer.fit(module, data)
        lap = clock.laps[-1]
        seconds = sum(lap.values())
        weights = sum(p.numel() for p in lm.parameters() if p.dtype == torch.bfloat16)
        product, copied = self.rates
        load = Workload(sizes.rows, sizes.rows // 2, sizes.minibatch, sizes.longest, sizes.new)
        known = ModelSettings(path="shape", dtype="bfloat16", lora=LORA)
        expected = estimate(self.config(shape), known, (), load, True).on_gpu / 2**30
        self.page.add(
            "iterations", shape, seconds, " / ".join(f"{lap[phase]:.2f}" for phase in ("rollout", "score", "train")),
            sizes.rows * sizes.new / seconds, sizes.rows * sizes.new / lap["rollout"],
            self.decoded_bytes(lm.config, weights) / copied / lap["rollout"],
            self.learned_flops(lm.config, weights) / product / lap["train"], clock.peak, expected,
        )  # fmt: skip
        if clock.seen is not None:
            self.kernels(shape, "training, one minibatch", clock.seen)

    def learned_flops(self, config: PretrainedConfig, weights: int) -> float:
        """Operations of training: forward and backward, frozen weights without gradient; attention is not counted.

        4 per weight and token in the layers of both roles, 4 per weight of the policy's head and response token.
        """
        head = config.vocab_size * config.hidden_size
        tokens = sum(self.sizes.lengths) + self.sizes.rows * self.sizes.new
        responses = self.sizes.rows * self.sizes.new
        return 4 * (4.0 * 2 * (weights - head) * tokens + 4.0 * head * responses)


class Words(Corpus):
    """Prompts of random words; each is one token."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def prompts(self, split: str) -> list[PromptRow]:
        """One prompt of each length."""
        return [PromptRow(" ".join(f"w{(7 * n + i) % 500}" for i in range(n))) for n in self.lengths]


class EvenTokens:
    """The share of even tokens: a reward without a model."""

    def score_rollout(self, rollout: Rollout) -> Tensor:
        """(B,)."""
        return (rollout.response_ids % 2 == 0).float().mean(dim=1)


class PhaseClock(Callback):
    """Seconds of each phase; profiles the third minibatch of the last iteration but one."""

    def __init__(self, bench: Bench, maker: ExperienceMaker) -> None:
        self.bench, self.laps, self.peak, self.seen = bench, [], 0.0, None
        sample = maker.sample

        def timed(*arguments: Any) -> Any:
            self.laps.append({})
            if bench.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.since = bench.synchronize()
            rollout = sample(*arguments)
            self.lap("rollout")
            return rollout

        maker.sample = timed  # type: ignore[method-assign]

    def lap(self, phase: str) -> None:
        """Assign the time since the last lap to a phase."""
        now = self.bench.synchronize()
        self.laps[-1][phase] = now - self.since
        self.since = now

    def on_train_batch_start(self, trainer: Trainer, pl_module: PPOModule, batch: Any, batch_idx: int) -> None:
        """The experience is made. In one iteration a minibatch is profiled, whose time does not count."""
        self.lap("score")
        if self.bench.device == "cuda" and batch_idx == self.bench.sizes.iterations - 2:
            learn, calls = pl_module._learn_minibatch, iter(range(1_000_000))

            def profiled(*arguments: Any) -> bool:
                if next(calls) != 2:
                    return learn(*arguments)
                with profile(activities=[ProfilerActivity.CUDA]) as self.seen:
                    result = learn(*arguments)
                    torch.cuda.synchronize()
                return result

            pl_module._learn_minibatch = profiled  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, pl_module: PPOModule, outputs: Any, batch: Any, _: int) -> None:
        """End the iteration."""
        self.lap("train")
        pl_module.__dict__.pop("_learn_minibatch", None)
        if self.bench.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated() / 2**30


def run_tests(page: Page) -> None:
    """The tests that need a device."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "8", "-W", "ignore", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout, flush=True)
    page.note(f"Tests that need a device (`pytest tests/gpu`): {done.stdout.strip().splitlines()[-1]}.")


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--only", nargs="+", choices=("tests", "decode", "iterate"), metavar="PART")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--results", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    trial = arguments.small or arguments.device == "cpu"
    results = arguments.results or ROOT / ("logs/gpu" if trial else "benchmarks/results")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "a CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    page = Page(results, f"    python -m benchmarks.gpu\n\n{card}; {versions}. {ABOUT}")
    bench = Bench(arguments.device, arguments.small, page)
    parts = arguments.only or ("tests", "decode", "iterate")
    if "tests" in parts:
        run_tests(page)
    for shape in arguments.shapes:
        if "decode" in parts:
            bench.decode(shape)
        if "iterate" in parts:
            bench.iterate(shape)
    Console().print(f"Written: {results / 'gpu.md'}")


if __name__ == "__main__":
    main()
