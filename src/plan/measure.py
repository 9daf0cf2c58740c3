"""Measure this machine's rates, in CPU seconds on one thread, or seconds of a GPU: `python -m src.plan.measure`.

Small models of several shapes sample, score and learn by the code of training. Each pass is a sum over kinds of work,
amount times seconds per unit; the seconds per unit, at least 0, are those that leave the least relative squared error,
scaled to be right on the (geometric) mean.
CPU seconds are those of this process, so other programs lengthen them little.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from src.data.tokenizers import word_level
from src.models.roles import Roles, build_roles
from src.models.settings import LoraSettings, ModelSettings
from src.modules.ppo import adam
from src.plan.machine import BY_DTYPE, MEASURED, Machine
from src.plan.read import shape_of
from src.plan.work import KINDS, Rows, Work, decode, forward, learn
from src.rollout.sampling import Sampler
from src.types import Rollout
from src.utils.output import set_up_output

REPEATS = 3  # of which the median counts, after one that warms up
HERE = tuple(kind for kind in KINDS if kind != "sent")


@dataclass(frozen=True)
class Probe:
    """A small model, and the rows that it reads."""

    kind: str
    sizes: dict[str, int]
    rows: int
    prompt: int  # tokens of the longest prompt; the shortest has half of them
    response: int
    whole: bool = False  # every weight is also trained


PROBES = (
    Probe("gpt2", {"n_layer": 2, "n_embd": 768, "n_head": 12, "vocab_size": 2000}, 8, 40, 32, whole=True),
    Probe("gpt2", {"n_layer": 6, "n_embd": 128, "n_head": 4, "vocab_size": 500}, 8, 20, 16),
    Probe("gpt2", {"n_layer": 2, "n_embd": 256, "n_head": 4, "vocab_size": 1000}, 4, 240, 40),
    Probe("llama", {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8,
                    "num_key_value_heads": 2, "vocab_size": 16000}, 8, 30, 24, whole=True),
    Probe("llama", {"num_hidden_layers": 4, "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3,
                    "num_key_value_heads": 3, "vocab_size": 1000}, 16, 30, 64),
)  # fmt: skip
Sample = tuple[Work, float]  # a pass, and its seconds


def samples(probe: Probe, dtype: str, lora: LoraSettings | None, folder: Path) -> Iterator[Sample]:
    """Every pass of the probe's roles."""
    config = AutoConfig.for_model(probe.kind, bos_token_id=1, eos_token_id=1, pad_token_id=0, **probe.sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = ModelSettings("probe", str(folder), dtype, lora=lora)
    roles = build_roles(settings, word_level(["a b"])).to("cuda" if torch.cuda.is_available() else "cpu")
    shape, rollout = shape_of(config, dtype, lora), rollout_of(probe, probe.sizes["vocab_size"], roles)
    mean = float(rollout.prompt_mask.sum(1).float().mean())
    whole, adapted = Rows(probe.rows, mean + probe.response), None if lora is None else shape.layers
    read = Rows(probe.rows, mean + probe.response, probe.response)
    for rows in (1, probe.rows):
        work = decode(shape, rows, rows, mean, probe.response, adapted or 0)
        yield work, seconds(partial(_sample, roles, rollout, rows, probe.response))
    with torch.no_grad():
        yield (
            forward(shape, read, shape.layers, adapted or 0),
            seconds(lambda: roles.distribution(rollout, 1).logprobs()),
        )
        yield forward(shape, whole, shape.layers, adapted or 0), seconds(lambda: roles.values(rollout))
    yield learn(shape, read, shape.layers, adapted), seconds(lambda: _learn(roles, rollout))
    yield learn(shape, whole, shape.layers, adapted), seconds(lambda: roles.values(rollout).sum().backward())
    optimizer = adam(roles.policy_parameters())
    yield Work(updates=sum(p.numel() for p in roles.policy_parameters())), seconds(optimizer.step)


def _learn(roles: Roles, rollout: Rollout) -> None:
    logprobs, entropy = roles.distribution(rollout, 1.0).logprobs_and_entropy()
    (logprobs.sum() + 0 * entropy.sum()).backward()


def _sample(roles: Roles, rollout: Rollout, rows: int, new: int) -> None:
    no_end = torch.empty(0, dtype=torch.int64, device=rollout.prompt_ids.device)
    draws = torch.Generator(rollout.prompt_ids.device).manual_seed(0)
    with roles.acting("policy") as lm:
        Sampler(new).sample(lm, rollout.prompt_ids[-rows:], rollout.prompt_mask[-rows:], no_end, 0, draws)


def rollout_of(probe: Probe, words: int, roles: Roles) -> Rollout:
    """Random tokens: prompts of half the longest length to the longest, responses of equal length."""
    device, draws = next(roles.parameters()).device, torch.Generator().manual_seed(0)

    def ids(columns: int) -> Tensor:
        return torch.randint(2, words, (probe.rows, columns), generator=draws).to(device)

    lengths = torch.linspace(probe.prompt / 2, probe.prompt, probe.rows).round().long()
    mask = torch.arange(probe.prompt) >= probe.prompt - lengths.unsqueeze(1)
    true, none = torch.ones(probe.rows, probe.response, dtype=torch.bool, device=device), ("",) * probe.rows
    index = torch.arange(probe.rows, device=device)
    return Rollout(
        prompt_ids=ids(probe.prompt), prompt_mask=mask.to(device), response_ids=ids(probe.response), response_mask=true,
        behavior_logprobs=true.float(), finished=true[:, 0], prompt_index=index, group_ids=index, prompts=none,
        responses=none, metadata=({},) * probe.rows, policy_version=0,
    )  # fmt: skip


def seconds(run: Callable[[], Any]) -> float:
    """The median of some repeats: of the process's CPU time, or with a GPU of the time until it has finished."""
    clock, found = time.perf_counter if torch.cuda.is_available() else time.process_time, []
    for _ in range(1 + REPEATS):
        since = clock()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(clock() - since)
    return statistics.median(found[1:])


def fitted(measured: list[Sample]) -> dict[str, float]:
    """Seconds per unit of each kind, none below 0, with the least sum of ((prediction - seconds) / seconds)^2.

    The least squares of every choice of kinds that are not 0 are tried: the best without a negative one is the answer.
    Least squares of relative errors come out low, so the answer is then scaled: the geometric mean of prediction /
    seconds is 1.
    """
    amounts = np.array([[asdict(work)[kind] / spent for kind in HERE] for work, spent in measured])
    scale = np.maximum(amounts.max(axis=0), 1e-300)
    amounts, best, answer = amounts / scale, np.inf, np.zeros(len(HERE))
    for chosen in itertools.product((False, True), repeat=len(HERE)):
        columns = np.flatnonzero(chosen)
        found = np.zeros(len(HERE))
        if len(columns):
            found[columns] = np.linalg.lstsq(amounts[:, columns], np.ones(len(amounts)), rcond=None)[0]
        error = float(((amounts @ found - 1) ** 2).sum())
        if (found >= 0).all() and error < best:
            best, answer = error, found
    ratios = amounts @ answer
    answer /= np.exp(np.log(ratios[ratios > 0]).mean()) if (ratios > 0).any() else 1.0
    return {kind: float(value) for kind, value in zip(HERE, answer / scale, strict=True)}


def machine(name: str, source: str) -> tuple[Machine, list[tuple[float, float]]]:
    """This machine, and (predicted, measured) seconds of each pass."""
    rates, pairs = {}, []
    jobs = [(d, p, a) for d in BY_DTYPE for p in PROBES for a in ([False, True] if p.whole else [False])]
    measured: dict[str, list[Sample]] = {dtype: [] for dtype in BY_DTYPE}
    for dtype, probe, whole in track(jobs, "measuring", console=Console(stderr=True)):
        with tempfile.TemporaryDirectory() as folder:
            measured[dtype] += samples(probe, dtype, None if whole else LoraSettings(), Path(folder))
    for dtype, found in measured.items():
        rates[dtype] = fitted(found)
        pairs += [(Machine("", "", rates).time(work, dtype), spent) for work, spent in found]
    return Machine(name, source, rates), pairs


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.plan.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, default=MEASURED, help="where the rates are kept (%(default)s)")
    file = parser.parse_args().file
    set_up_output()
    torch.set_num_threads(1)
    found, pairs = machine("this machine", "python -m src.plan.measure")
    found.save(file)
    off = [abs(predicted / spent - 1) for predicted, spent in pairs]
    print(f"{len(off)} passes, of which the rates miss half by less than {statistics.median(off):.0%}: {file}")


if __name__ == "__main__":
    main()
