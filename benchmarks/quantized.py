"""PPO of a real language model on a base in 4 and 8 bits (model.quantize), next to the same base in bfloat16.

    python -m examples.real_model
    python -m benchmarks.quantized

All runs share an SFT model and a reward model, trained for fewer steps than those of benchmarks.real, and prompts and
random numbers. Writes benchmarks/results/quantized.json and quantized.md: gold, KL, seconds per iteration; the peak
memory of one iteration in a separate process, against the estimate; how far the exported model is from the trained.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from benchmarks.memory import MIB, RETURNED
from benchmarks.real import MODEL, REVIEWS
from benchmarks.seeds import RESULTS, cell, digest, ended, newest_result
from src.config.compose import compose
from src.config.schema import PPORun
from src.export.parity import base_and_adapter
from src.memory.estimate import size
from src.memory.report import estimate_of
from src.models.loading import load_causal_lm
from src.models.quantized import merged
from src.models.settings import ModelSettings
from src.runs.start import train
from src.utils.output import set_up_output
from src.utils.seeding import generator

BASES = {"bfloat16": "null", "nf4": "nf4", "int8": "int8"}
SHARED = ("experiment=movie_reviews", f"data.path={REVIEWS}")
SFT = ("stage=sft", f"model.path={MODEL}", "sft.steps=100", "sft.eval_rows=200")
REWARD = ("stage=reward", "reward_model.steps=70", "reward_model.normalization_samples=128")
SIZES = ("ppo.batch_size=32", "ppo.minibatch_size=16", "rollout.max_new_tokens=20", "ppo.held_out.every=null")
PPO = (*SIZES, "ppo.num_iterations=10", "ppo.eval_prompts=96")
# prompts of 5 tokens, their median: the estimate counts them as long as they may be, and padding is not computed
ONCE = (
    *SIZES, "rollout.max_prompt_tokens=5", "reward=vader", "ppo.num_iterations=1", "ppo.epochs=1", "ppo.eval_prompts=4",
)  # fmt: skip
CODE = digest(SFT, REWARD, PPO)
FIGURES = (
    ("gold, SFT policy on this base", "sft", "gold"),
    ("gold, PPO policy", "ppo", "gold"),
    ("improvement of gold", "improvement", "gold"),
    ("improvement of the score", "improvement", "score"),
    ("KL to the reference (nats per sequence)", "ppo", "kl"),
)


class Clock(Callback):
    """Writes the processor's seconds so far at the end of each iteration; other work on the machine is not in them."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, *_: Any) -> None:
        """A line more."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{time.process_time()}\n")


class Peak(Callback):
    """Writes the bytes of weights when training starts, and of the most that the process then takes on top of them."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin a new peak (Linux: 5 in clear_refs)."""
        self.weights = size(module.parameters())
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.before = psutil.Process().memory_info().rss

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The peak since."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        (kib,) = re.findall(r"VmHWM:\s+(\d+)", status)
        Path(self.path).write_text(str(self.weights + int(kib) * 1024 - self.before), encoding="utf-8")


def stage(name: str, *overrides: str) -> Path:
    """The folder of a run in a separate process; one of the same code that has ended is kept."""
    name, kind = f"{name}-{CODE}", next((o.removeprefix("stage=") for o in overrides if o.startswith("stage=")), "ppo")
    parent = Path("logs") / kind
    if not list(ended(parent, name)):
        subprocess.run([sys.executable, "-m", "src.train", *SHARED, *overrides, f"name={name}"], check=True)
    return newest_result(parent, name).parent


def clock(base: str) -> Path:
    """Where the processor's seconds of a run are."""
    return Path("logs") / f"quantized-{base}-{CODE}.clock"


def on(base: str, sft: Path) -> tuple[str, ...]:
    """The overrides of a base."""
    return f"model.path={sft / 'model'}", f"model.quantize={BASES[base]}"


def learned(base: str, sft: Path, reward: Path) -> Path:
    """The folder of one PPO run."""
    timed = ("+callbacks.clock._target_=benchmarks.quantized.Clock", f"+callbacks.clock.path={clock(base)}")
    return stage(f"quantized-{base}", *PPO, *on(base, sft), *timed, "reward=learned", f"reward.path={reward}")


def result(base: str, folder: Path, sft: Path) -> dict[str, Any]:
    """The result of a run, the median seconds of an iteration, memory, and the distance of its export."""
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    seconds = [float(line) for line in clock(base).read_text(encoding="utf-8").split()]
    return found | {
        "seconds_per_iteration": statistics.median(after - before for before, after in pairwise(seconds)),
        "memory": in_child(on(base, sft)),
        "export": distances(folder, sft / "model"),
    }


def in_child(given: tuple[str, ...]) -> dict[str, int]:
    """`measure` in a new process, which gives freed memory back at once: glibc would keep much of it."""
    command = [sys.executable, "-m", "benchmarks.quantized", "--measure", *given]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **RETURNED})
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def measure(given: list[str]) -> dict[str, int]:
    """Bytes of one iteration: the estimate, and the weights plus what the process takes on top of them at most."""
    with tempfile.TemporaryDirectory() as folder:
        peak = ("+callbacks.peak._target_=benchmarks.quantized.Peak", f"+callbacks.peak.path={folder}/peak")
        config = compose([*SHARED, *ONCE, *given, *peak, f"log_dir={folder}", "resume=never"])
        assert isinstance(config, PPORun)
        estimated = estimate_of(config).peak
        set_up_output()
        train(config.model_copy(update={"run_dir": f"{folder}/run"}))
        return {"estimate": estimated, "measured": int(Path(f"{folder}/peak").read_text(encoding="utf-8"))}


@torch.no_grad()
def distances(folder: Path, base: Path) -> dict[str, float]:
    """Largest |log p - log p'| in nats over all words at 32 random tokens: base and adapter as trained, and exported.

    `model`: the run's model/, merged in float32 and rounded to bfloat16, computed in bfloat16. `float32`: the merged
    weights of `python -m src.export dtype=float32`, both computed in float32.
    """
    trained = base_and_adapter(folder, str(base), False, False)
    ids = torch.randint(trained.config.vocab_size, (2, 16), generator=generator(0, "probe"))
    stored = load_causal_lm(ModelSettings(path=str(folder / "model"), dtype="bfloat16", fast_cpu=False))
    found = {"model": (logprobs(trained, ids) - logprobs(stored, ids)).abs().max().item()}
    expected = logprobs(trained.float(), ids)  # the same weights, as each layer's are rounded to bfloat16 before
    return found | {"float32": (expected - logprobs(merged(trained), ids)).abs().max().item()}


def logprobs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """log p of every word after each token, (B, S, V)."""
    found: torch.Tensor = model(input_ids=ids).logits.float().log_softmax(-1)
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each figure, a column for each base."""
    rows = {title: [cell(found, *name) for found in results.values()] for title, *name in FIGURES}
    rows["processor seconds per iteration (median)"] = [
        f"{found['seconds_per_iteration']:.0f}" for found in results.values()
    ]
    memory = [found["memory"] for found in results.values()]
    rows["peak memory, estimated (MiB)"] = [f"{found['estimate'] / MIB:.0f}" for found in memory]
    rows["peak memory, measured (MiB)"] = [f"{found['measured'] / MIB:.0f}" for found in memory]
    rows["estimated / measured"] = [f"{found['estimate'] / found['measured']:.2f}" for found in memory]
    for kind, title in {"model": "model/ (bfloat16)", "float32": "exported in float32"}.items():
        rows[f"largest difference of a log-probability, {title} (nats)"] = [
            f"{found['export'][kind]:.2g}" for found in results.values()
        ]
    lines = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    return "\n".join([*lines, *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items())]) + "\n"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", metavar="OVERRIDE", help="internal")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    sft = stage("quantized", *SFT)
    reward = stage("quantized", *REWARD, f"model.path={sft / 'model'}")
    folders = {base: learned(base, sft, reward) for base in BASES}
    results = {base: result(base, folder, sft) for base, folder in folders.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quantized.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "quantized.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
