"""Roles of trained models, for inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.errors import ModelError
from src.models.loading import load_causal_lm
from src.models.reward_adapter import RewardAdapter
from src.models.roles import Role, Roles
from src.models.settings import ModelSettings


class InferenceRoles(Roles):
    """A trained policy and, if given, its reference: plain frozen models."""

    def __init__(
        self, policy: PreTrainedModel, reference: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__(policy, tokenizer, checkpointing=False, critic=False)
        self.models = nn.ModuleDict({"policy": policy} | ({"reference": reference} if reference is not None else {}))
        self.models.requires_grad_(False)
        self.eval()

    @contextmanager
    def acting(self, role: Role) -> Iterator[PreTrainedModel]:
        """The model of that role. Raises `ModelError` if there is none."""
        if role not in self.models:
            raise ModelError(f"this model was loaded without a {role}")
        yield self.models[role]

    def policy_parameters(self) -> list[nn.Parameter]:
        """Nothing is trained."""
        return []

    def critic_parameters(self) -> list[nn.Parameter]:
        """Nothing is trained."""
        return []

    def add_reward(self, adapter: RewardAdapter) -> None:
        """There is no shared base."""
        raise ModelError("a trained policy is merged into its base and has no reward adapter: use reward=learned")

    def save_adapter(self, folder: Path) -> bool:
        """There is no adapter."""
        return False

    def merged_policy(self) -> PreTrainedModel:
        """A copy of the policy."""
        return copy.deepcopy(self.models["policy"])


def load_inference_roles(
    model: ModelSettings, tokenizer: PreTrainedTokenizerBase, policy: str, reference: str | None
) -> InferenceRoles:
    """Both from folders, the reference held as in training (`model.quantize`), the policy in plain weights.

    Raises `ModelError`, also when their vocabularies differ, as their KL is not defined then.
    """
    lm = load_causal_lm(replace(model, quantize=None), policy)
    other = load_causal_lm(model, reference) if reference is not None else None
    sizes = [model.config.get_text_config().vocab_size for model in (other or lm, lm)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the reference {reference!r} has a vocabulary of {sizes[0]} tokens, {policy!r} one of {sizes[1]}: they "
            f"cannot be compared"
        )
    return InferenceRoles(lm, other, tokenizer)
