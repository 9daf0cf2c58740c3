"""The matrix in docs/models.md: what every architecture does here, measured on its small random copy."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.errors import UserError
from src.export.parity import compare
from src.models.head_function import PLAIN, function_of
from src.models.loading import load_causal_lm
from src.models.probe import probe
from src.models.roles import LoraRoles
from src.rollout.sampler_check import LARGEST
from src.rollout.sampling import Sampler
from tests.matrix.architectures import write
from tests.tiny import (
    fit,
    make_maker,
    make_module,
    make_prompts,
    make_roles,
    model_settings,
    plain_logprobs,
    plain_model,
    rows_of,
    same_bits,
    snapshot,
)

MARK = "## Which architectures\n"
TEXTS = ["the film was", "good", "the film was good and the music was", "the film was"]
HEAD = """
Written by `python -m tests.matrix`, which takes some minutes; a test compares this page with the table of architectures
and measures two of them again, a slow one all. Each row is a random copy of two layers, in float32 on a CPU, with the
true modeling code of transformers:

- **sampler**: the largest difference in nats between the sampler's log-probabilities (a batch of ragged prompts, with
  the cache, with a LoRA adapter that changes every token) and each row alone through the model's own forward pass;
- **LoRA**: linear layers with an adapter, of all in the text model, and adapters on fused matrices of experts, which
  peft puts there instead of on dense layers of the same names. Without one stay routers that are no plain product, and
  the projections of Mamba's layers that the scan reads itself;
- **PPO**: two iterations with policy and critic as adapters moved both, and every number was finite;
- **export**: KL in nats per token between base with adapter and the merged model, read again from its folder.

Every run makes the first comparison itself, on its first batch, and stops when the two differ by more than 0.005 nats
(float32, the largest), or by 0.1 nats (bfloat16, float16, TF32, the mean).
"""


@dataclass(frozen=True)
class Served:
    """What was measured."""

    traits: str
    sampler: float  # nats
    adapted: str
    export: float  # nats


def measure(name: str, folder: Path) -> Served | str:
    """The row of an architecture: figures, or the sentence that refuses it. Raises what is no `UserError`."""
    path = write(folder / "model", name)
    try:
        roles = make_roles(path, spread=0.1)
        assert isinstance(roles, LoraRoles)
        sampler = _sampler_error(roles)
        _train(roles, folder)
        make_module(roles).save(folder / "run")
        lm = load_causal_lm(model_settings(str(folder / "run/model")))
    except UserError as error:
        return str(error).replace(str(folder / "model"), "FOLDER")
    assert sampler <= LARGEST[torch.float32], f"{name}: the run did not find a difference of {sampler} nats"
    return Served(
        _traits(lm), sampler, _adapted(roles), compare(folder / "run", folder / "run/model", path, False).difference
    )


def _sampler_error(roles: LoraRoles) -> float:
    """The largest difference of a token's logprob between the sampler and the plain forward pass of single rows."""
    maker = make_maker(sampler=Sampler(max_new_tokens=16))
    rollout = maker.sample(roles, "policy", make_prompts(TEXTS), 0, torch.Generator().manual_seed(1))
    plain = plain_logprobs(plain_model(roles, "policy"), rollout)
    drawn = rows_of(rollout.behavior_logprobs, rollout.response_mask)
    return max(abs(a - b) for x, y in zip(drawn, plain, strict=True) for a, b in zip(x, y, strict=True))


def _train(roles: LoraRoles, folder: Path) -> None:
    """Two iterations of PPO, after which policy and critic are others and the base is not."""
    trained = {"policy": roles.policy_parameters(), "critic": roles.critic_parameters()}
    frozen = [parameter for parameter in roles.parameters() if not parameter.requires_grad]
    before, base = {role: snapshot(parameters) for role, parameters in trained.items()}, snapshot(frozen)
    recorder, _ = fit(make_module(roles), folder, maker=make_maker(sampler=Sampler(max_new_tokens=16)))
    numbers = [value for row in recorder.by_step().values() for value in row.values()]
    assert len(recorder.by_step()) == 2
    assert all(map(math.isfinite, numbers))
    assert same_bits(base, frozen)
    for role, parameters in trained.items():
        assert not same_bits(before[role], parameters), role


def _adapted(roles: LoraRoles) -> str:
    lm = roles.peft.get_base_model()
    found = [hasattr(layer, "parameter_name") for layer in lm.base_model.modules() if isinstance(layer, LoraLayer)]
    plain = copy.deepcopy(roles.peft).unload().get_decoder()
    linear = sum(isinstance(module, nn.Linear | Conv1D) for module in plain.modules())
    return f"{len(found) - sum(found)} of {linear}" + (f", {sum(found)} of experts" if any(found) else "")


def _traits(lm: PreTrainedModel) -> str:
    """What tells the architecture apart, read off its modules and its configuration."""
    text = lm.config.get_text_config()
    names = [name for name, _ in lm.base_model.named_modules()]
    kinds = {kind.removesuffix("_attention") for kind in getattr(text, "layer_types", None) or []} - {"full"}
    if getattr(text, "sliding_window", None) and not getattr(text, "layer_types", None):
        kinds.add("sliding")
    head, linear = lm.get_output_embeddings(), [m for m in lm.base_model.modules() if isinstance(m, nn.Linear | Conv1D)]
    found = [
        *(["experts"] if any("expert" in name for name in names) else []), *sorted(kinds),
        *(["tied"] if head.weight is lm.get_input_embeddings().weight else []),
        *(["biases"] if any(layer.bias is not None for layer in linear) else []),
        *(["scaled or capped logits"] if function_of(probe(lm).get_output_embeddings()) != PLAIN else []),
    ]  # fmt: skip
    return ", ".join(found)


def matrix(rows: dict[str, Served | str]) -> str:
    """The section of the page."""
    done = {name: row for name, row in rows.items() if isinstance(row, Served)}
    lines = [
        MARK + HEAD,
        f"{len(done)} of {len(rows)} are served:\n",
        "| `model_type` | traits | sampler | LoRA | PPO | export |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {r.traits} | {r.sampler:.0e} | {r.adapted} | yes | {r.export:.0e} |"
            for name, r in done.items()
        ),
        "\nThese are refused, before or at the first batch, in a sentence:\n",
        "| `model_type` | sentence |",
        "|---|---|",
        *(f"| {name} | {row} |" for name, row in rows.items() if isinstance(row, str)),
    ]
    return "\n".join(lines) + "\n"


def verdicts(page: str) -> dict[str, bool]:
    """Which architectures a page lists, and whether it says that they are served."""
    section = page.partition(MARK)[2]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ") and "model_type" not in line]
    return {cells[0].removeprefix("| "): len(cells) == 6 for cells in rows}
