"""Gain and bias of a reward model's output."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from src.errors import ModelError

BIAS_KEY = "score_bias"  # in config.json: added to the output when the weights cannot hold it


def output_layer(model: nn.Module) -> nn.Linear:
    """The last linear layer with one output: the score head of any architecture."""
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    if not heads:
        raise ModelError(f"{type(model).__name__} has no linear layer with one output to read a score from")
    return heads[-1]


@torch.no_grad()
def scale_scores(model: nn.Module, factor: float) -> None:
    """Replace the score r by factor * r, in the weights of the score head."""
    head = output_layer(model)
    head.weight *= factor
    if head.bias is not None:
        head.bias *= factor


@torch.no_grad()
def shift_scores(model: PreTrainedModel, bias: float) -> None:
    """Replace the score r by r + bias, in the weights that plain transformers loads if they can hold it.

    The bias is added to the score head's bias if it has one, else to the bias of the last layer norm before it: for
    a head w, adding d = bias w / |w|^2 shifts the score by w . d = bias. Without either (a head without bias on an
    RMS norm, as in Llama and Qwen) no weight can hold a constant, and the bias is written to the configuration as
    `score_bias`: `src.rewards.learned` adds it, plain transformers does not.
    """
    head = output_layer(model)
    norms = [module for module in model.base_model.children() if getattr(module, "bias", None) is not None]
    if head.bias is not None:
        head.bias += bias
    elif norms:
        norms[-1].bias += bias * head.weight[0] / head.weight[0].square().sum()
    else:
        setattr(model.config, BIAS_KEY, score_bias(model) + bias)


def score_bias(model: PreTrainedModel) -> float:
    """The constant to add to a model's output."""
    return float(getattr(model.config, BIAS_KEY, 0.0))


def value_head(hidden_size: int) -> nn.Linear:
    """V = w h + b with w = 0, b = 0: V(s) = 0, at the scale of no reward and of every one.

    The explained variance of the first iteration is then 0; a head of random weights, as in "The N implementation
    details of RLHF with PPO" (https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo), starts with
    values of size 1, whatever the returns are. The critic's adapter gets its first gradient in the second step.
    """
    head = nn.Linear(hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
