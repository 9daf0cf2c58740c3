"""The frozen layers below the lowest adapter, and the rest of the model that starts from their output.

With adapters in the top layers only, h_m = layers_1..m(x) is the same for policy, critic and reference and in all
epochs: it is computed once per experience. This is exact: no layer below is trained, so none needs a gradient. With
adapters of the critic in the top layers only (`model.lora.critic_layers`), critic and reference read h_m, and the
policy, which adapts all layers, does not.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.errors import ModelError


class Anatomy(NamedTuple):
    """Names within a backbone: its list of layers, the norm after them, the modules whose output the embeddings add."""

    layers: str
    norm: str
    positions: str | None


ANATOMIES = {
    "gpt2": Anatomy("h", "ln_f", "wpe"),
    "gpt_neox": Anatomy("layers", "final_layer_norm", None),
    "llama": Anatomy("layers", "norm", None),
    "qwen2": Anatomy("layers", "norm", None),
}


class NoPositions(nn.Module):
    """Adds nothing, as the trunk's output already includes the positions."""

    def forward(self, positions: Tensor) -> Tensor:
        """A zero that broadcasts."""
        return torch.zeros((), device=positions.device)


def split(lm: PreTrainedModel, top: int) -> tuple[nn.Module, nn.Module]:
    """The backbone of `lm` below its `top` highest layers, and those layers; both share the modules of `lm`.

    upper(inputs_embeds=lower(input_ids).last_hidden_state) equals backbone(input_ids). Raises `ModelError` for an
    architecture that is not in `ANATOMIES`.
    """
    backbone, anatomy = lm.base_model, ANATOMIES.get(lm.config.model_type)
    if anatomy is None:
        raise ModelError(
            f"model.lora: the layers of a {lm.config.model_type!r} cannot be split yet (known: "
            f"{', '.join(ANATOMIES)}); set model.lora.layers=null and model.lora.critic_layers=null"
        )
    below = lm.config.num_hidden_layers - top
    kept_out: dict[str, nn.Module] = {} if anatomy.positions is None else {anatomy.positions: NoPositions()}
    lower = part(backbone, slice(0, below), {anatomy.norm: nn.Identity()}, anatomy)
    return lower, part(backbone, slice(below, None), kept_out, anatomy)


def part(backbone: Any, which: slice, instead: dict[str, nn.Module], anatomy: Anatomy) -> nn.Module:
    """A shallow copy of a backbone with some of its layers, and some modules replaced by `instead`."""
    layers = backbone.get_submodule(anatomy.layers)[which]
    shell: nn.Module = copy.copy(backbone)
    shell._modules = backbone._modules | {anatomy.layers: layers} | instead
    config = copy.copy(backbone.config)
    config.num_hidden_layers = len(layers)
    kinds = getattr(backbone.config, "layer_types", None)
    if kinds is not None:
        config.layer_types = kinds[which]
    shell.config = config
    return shell
