"""Weights that lie on all ranks, each with a shard of every layer (FSDP2, https://arxiv.org/abs/2304.11277).

`fully_shard` of PyTorch gathers a layer's weights just before its pass and frees them just after, in the forward and in
the backward pass; so every rank must make the same passes. Each decoder layer is a group of its own, and so is each
module outside of them. The vocabulary head is read in blocks of words and not called: `plain_head` gathers it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from src.errors import ModelError
from src.utils.distributed import broadcast_, rank, whole, world_size


def is_sharded(net: nn.Module) -> bool:
    """Whether `shard` has been called."""
    return any(isinstance(module, FSDPModule) for module in net.modules())


def shard(net: nn.Module, device: torch.device) -> nn.Module:
    """Keep on each rank its shard of every parameter of `net`, in place, on `device`; the values are those of rank 0.

    Returns a copy without weights, which `collect` fills. Gradients are summed over ranks. Raises `ModelError` for
    layers that read weights past their modules, those of `src.kernels`, and for weights that two groups share.
    """
    shell = without_weights(net)
    if any(hasattr(module, "fast_pass") for module in net.modules()):
        raise ModelError("trainer=fsdp cannot shard the fast layers for CPUs, which read weights directly: set "
                         "model.fast_cpu=false")  # fmt: skip
    mesh, heads = init_device_mesh(device.type, (world_size(),)), _vocabulary_heads(net)
    groups = list(_groups(net, heads))
    places = _places(groups)
    for module in groups:
        module.to(device)
        broadcast_(parameter for parameter in module.parameters() if parameter.requires_grad)
        layer: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    for head in heads:
        for name, parameter in head._parameters.items():
            if parameter is not None:
                place = places.get(id(parameter))  # of an embedding that it is tied to
                head._parameters[name] = _shards(parameter, mesh) if place is None else getattr(*place)
    return shell


def plain_head(head: nn.Module) -> nn.Module:
    """A vocabulary head with its weights gathered, for reading; their gradients reach the shards. Every rank calls it.

    The same head if it is not sharded.
    """
    if not any(isinstance(parameter, DTensor) for parameter in head._parameters.values()):
        return head
    plain = copy.copy(head)
    plain._parameters = {}
    for name, parameter in head._parameters.items():
        object.__setattr__(plain, name, None if parameter is None else whole(parameter))
    return plain


@contextmanager
def gathered(lm: PreTrainedModel) -> Iterator[None]:
    """All weights of a model on every rank within the block, for passes that other ranks do not make; no gradients."""
    layers: list[Any] = [module for module in lm.modules() if isinstance(module, FSDPModule)]
    if not layers:
        yield
        return
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    shards, tied = dict(head._parameters), head.weight is embedding.weight
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    head._parameters |= {
        name: embedding.weight if tied and name == "weight" else nn.Parameter(whole(p), requires_grad=False)
        for name, p in shards.items()
        if p is not None
    }
    try:
        yield
    finally:
        head._parameters |= shards
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True)


def without_weights(net: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes and no memory."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in net.parameters()
    }
    return copy.deepcopy(net, empty)


@torch.no_grad()
def collect(net: nn.Module, shell: nn.Module) -> None:
    """Fill the shell on rank 0 with the weights of all ranks, on the CPU, one tensor at a time; every rank calls it."""
    empty = dict(shell.named_parameters())
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in shell.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    for name, parameter in net.named_parameters():
        full = whole(parameter.detach())
        if rank() == 0:
            filled = nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad)
            for module, leaf in places[id(empty[name])]:
                module._parameters[leaf] = filled
    shell.__dict__ |= {key: value for key, value in vars(net).items() if isinstance(value, int | float | str)}


def _groups(module: nn.Module, heads: list[nn.Module]) -> Iterator[nn.Module]:
    """The modules whose weights are gathered together: decoder layers, and outside of them those with own weights."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if any(module is head for head in heads):
        return
    if isinstance(module, GradientCheckpointingLayer) or (own and not any(True for _ in module.children())):
        yield module
        return
    if own:
        raise ModelError(f"trainer=fsdp cannot shard a {type(module).__name__}, which has weights ({own[0]}) and parts")
    for child in module.children():
        yield from _groups(child, heads)


def _places(groups: list[nn.Module]) -> dict[int, tuple[nn.Module, str]]:
    """Module and attribute of every tensor of the groups, by its id. Raises `ModelError` when two groups share one."""
    places: dict[int, tuple[nn.Module, str]] = {}
    for group in groups:
        own = {id(p): (m, name) for m in group.modules() for name, p in m._parameters.items() if p is not None}
        if places.keys() & own.keys():
            raise ModelError(
                f"trainer=fsdp cannot shard a {type(group).__name__} that shares weights with another part"
            )
        places |= own
    return places


def _vocabulary_heads(net: nn.Module) -> list[nn.Module]:
    """The heads that turn hidden states into logits."""
    models = [module for module in net.modules() if isinstance(module, PreTrainedModel)]
    heads = [*(model.get_output_embeddings() for model in models), getattr(net, "lm_head", None)]
    return list({id(head): head for head in heads if isinstance(head, nn.Module)}.values())


def _shards(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's shard of a parameter that is cut by its first dimension."""
    moved = parameter.detach().to(mesh.device_type)
    return nn.Parameter(distribute_tensor(moved, mesh, [Shard(0)]), requires_grad=parameter.requires_grad)
