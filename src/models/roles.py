"""The roles: policy, critic, reference and reward model, on one frozen base if they are adapters.

A role's forward *and* backward pass must end before the next role acts: gradient checkpointing recomputes with the
adapter that is active then.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.core.masking import masked
from src.errors import ModelError
from src.kernels.fast_layers import prepack
from src.models.adapter_folders import save_one
from src.models.adapters import add_adapter, lora_config, places
from src.models.distribution import TokenDistribution
from src.models.endings import endings
from src.models.forward import (
    at_actions,
    backbone_states,
    gradient_checkpointing,
    head_at_end,
    hidden_states,
    scalar,
    whole_sequence,
)
from src.models.loading import build_tokenizer, load_causal_lm
from src.models.probe import probe
from src.models.quantized import merged
from src.models.reward_adapter import RewardAdapter, attach
from src.models.scalar_head import value_head
from src.models.settings import LoraSettings, ModelSettings
from src.models.sharding import plain_head
from src.models.trunk import split
from src.models.weights import restore, snapshot
from src.types import Rollout
from src.utils.allocator import keep_freed_memory
from src.utils.seeding import stream_seed

Role = Literal["policy", "critic", "reference", "reward"]


class Roles(nn.Module, ABC):
    """Interface of the models of PPO. Always in eval mode: dropout would change the ratios."""

    value_head: nn.Linear | None
    score_head: nn.Linear | None  # frozen; None unless a reward model is on the base

    def __init__(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpointing: bool, critic: bool
    ) -> None:
        super().__init__()
        self.tokenizer, self.checkpointing = tokenizer, checkpointing
        self.fast_cpu = hasattr(probe(base).base_model, "fast_pass")
        self.endings = endings(tokenizer, base.generation_config)
        at_least = torch.promote_types(base.dtype, torch.float32)
        self.value_head = value_head(base.get_output_embeddings().weight.shape[1]).to(at_least) if critic else None
        self.score_head = None

    @abstractmethod
    def acting(self, role: Role) -> AbstractContextManager[PreTrainedModel]:
        """The language model with `role` active, within the `with` block."""

    @abstractmethod
    def policy_parameters(self) -> list[nn.Parameter]:
        """The parameters of the policy's optimizer."""

    @abstractmethod
    def critic_parameters(self) -> list[nn.Parameter]:
        """The parameters of the critic's optimizer, value head included; empty without a critic."""

    def add_reward(self, adapter: RewardAdapter) -> None:
        """Add a trained reward model to the base as a frozen role. Raises `ModelError` without a shared base."""
        raise ModelError("these models are whole (model.lora=null): reward=adapter needs a base that the roles share")

    @abstractmethod
    def save_adapter(self, folder: Path) -> bool:
        """Write the policy as a LoRA adapter folder; returns False if it is not an adapter."""

    @abstractmethod
    def merged_policy(self) -> PreTrainedModel:
        """A plain copy of the policy, without adapters and value head."""

    def train(self, mode: bool = True) -> Roles:
        """Stay in eval mode; the Trainer's call has no effect."""
        return super().train(False)

    def distribution(self, rollout: Rollout, temperature: float, role: Role = "policy") -> TokenDistribution:
        """pi(. | s_t) of a role at the response tokens in the mask."""
        mask = rollout.response_mask
        with self.acting(role) as lm:
            hidden = self._hidden(lm, rollout, role)[mask]
            head = plain_head(lm.get_output_embeddings())
        return TokenDistribution(hidden, head, rollout.response_ids[mask], mask, temperature)

    def old_distribution(self, rollout: Rollout, temperature: float, old_policy: list[Tensor]) -> TokenDistribution:
        """pi_old(. | s_t), without gradient; `old_policy` are earlier copies of `policy_parameters()`."""
        parameters = self.policy_parameters()
        with torch.no_grad():
            now = snapshot(parameters)
            restore(old_policy, parameters)
            try:
                return self.distribution(rollout, temperature).detached()
            finally:
                restore(now, parameters)

    def values(self, rollout: Rollout) -> Tensor:
        """V(s_t), (B, T) in float32 or better, 0 outside the mask. Raises `RuntimeError` without a critic."""
        if self.value_head is None:
            raise RuntimeError("these roles were built without a critic")
        with self.acting("critic") as lm:
            return masked(scalar(self.value_head, self._hidden(lm, rollout, "critic")), rollout.response_mask)

    def scores(self, ids: Tensor, mask: Tensor) -> Tensor:
        """r of the reward model on the base, read at the last counted token. Shapes: (B, S) -> (B,) float32.

        Raises `RuntimeError` if there is none.
        """
        if self.score_head is None:
            raise RuntimeError("these roles have no reward model on their base")
        with torch.no_grad(), self.acting("reward") as lm:
            return head_at_end(self.score_head, hidden_states(lm, ids, mask), mask).float()

    def _hidden(self, lm: PreTrainedModel, rollout: Rollout, role: Role) -> Tensor:
        with gradient_checkpointing(lm, self.checkpointing and torch.is_grad_enabled()):
            return at_actions(self._states(lm, rollout, role), rollout)

    def _states(self, lm: PreTrainedModel, rollout: Rollout, role: Role) -> Tensor:
        return hidden_states(lm, *whole_sequence(rollout))

    @property
    def shares_trunk(self) -> bool:
        """Whether there are layers that several roles read as they are in the base."""
        return False

    def trunk(self, rollout: Rollout) -> Tensor:
        """The output of those layers for a rollout, (B, P + T, H). Raises `RuntimeError` if there are none."""
        raise RuntimeError("these roles adapt every layer: there is no trunk to share")


class LoraRoles(Roles):
    """One frozen base with LoRA adapters: policy, critic, maybe a frozen reward model; the reference is without any."""

    def __init__(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: LoraSettings, checkpointing: bool,
        critic: bool, prepacked: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(base, tokenizer, checkpointing, critic)
        self.peft = add_adapter(base, lora, "policy")
        if isinstance(base.get_output_embeddings(), BaseTunerLayer):
            raise ModelError("model.lora.targets: the vocabulary head is shared by all roles and has no adapter")
        if critic:
            self.peft.add_adapter("critic", lora_config(lora.of_critic, base))
        self._adapters = {role: places(self.peft, role) for role in ("policy", "critic")}
        self._switch("policy")
        self.eval()
        if prepacked:
            prepack(base.base_model)  # not the head, which is computed in blocks of words
        top = lora.shared_above if critic else lora.layers
        self._parts = None if top is None else split(base, top)  # a tuple: not registered twice
        self._on_trunk = ("critic", "reference") if lora.layers is None else ("policy", "critic", "reference")

    @property
    def shares_trunk(self) -> bool:
        """True when adapters, or those of the critic, are in the top layers only."""
        return self._parts is not None

    def trunk(self, rollout: Rollout) -> Tensor:
        """The output of the lower part of the base without adapters, without gradient."""
        if self._parts is None:
            return super().trunk(rollout)
        ids, mask = whole_sequence(rollout)
        with torch.no_grad(), self.acting("reference"):
            return backbone_states(self._parts[0], mask, input_ids=ids)

    def _states(self, lm: PreTrainedModel, rollout: Rollout, role: Role) -> Tensor:
        if rollout.trunk is None or self._parts is None or role not in self._on_trunk:
            return super()._states(lm, rollout, role)
        return backbone_states(self._parts[1], whole_sequence(rollout)[1], inputs_embeds=rollout.trunk)

    @contextmanager
    def acting(self, role: Role) -> Iterator[PreTrainedModel]:
        """Switch adapters; the reference has none."""
        lm = self.peft.get_base_model()
        if role == "reference":
            try:
                with self.peft.disable_adapter():
                    yield lm
            finally:
                self._switch(self._active)
            return
        if role != self._active:
            self._switch(role)
        yield lm

    def policy_parameters(self) -> list[nn.Parameter]:
        """The tensors of the adapter "policy"."""
        return self._adapter("policy")

    def critic_parameters(self) -> list[nn.Parameter]:
        """The tensors of the adapter "critic" and the value head."""
        return [*self._adapter("critic"), *(self.value_head.parameters() if self.value_head is not None else ())]

    def add_reward(self, adapter: RewardAdapter) -> None:
        """Add the adapter "reward" and a score head, both frozen; the base must be the one that it was trained on."""
        attach(adapter, self.peft, "reward", self.tokenizer)
        self.score_head = adapter.head
        self._switch("policy")
        self.eval()

    def save_adapter(self, folder: Path) -> bool:
        """Write the adapter "policy" only; returns False, and writes nothing, if the base was itself an adapter."""
        return save_one(self.peft, "policy", folder)

    def merged_policy(self) -> PreTrainedModel:
        """A copy of the base with W + (alpha / rank) B A instead of each adapted W."""
        return merged(copy.deepcopy(self.peft), "policy")

    def _switch(self, role: Role) -> None:
        """Activate a role's adapter; policy and critic stay trainable, the reward stays frozen.

        peft alone would freeze the adapter that it switches off, which silently drops its gradients, and make the one
        that it switches on trainable.
        """
        self.peft.set_adapter(role, inference_mode=role == "reward")
        self._active: Role = role
        for parameter in [*self._adapter("policy"), *self._adapter("critic")]:
            parameter.requires_grad_(True)

    def _adapter(self, role: str) -> list[nn.Parameter]:
        """Its tensors, as they are now: sharding replaces them."""
        return [getattr(module, name) for module, name in self._adapters[role]]


class FullRoles(Roles):
    """Every weight is trained: policy and critic are separate whole models, the reference a frozen copy."""

    def __init__(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpointing: bool, critic: bool
    ) -> None:
        super().__init__(base, tokenizer, checkpointing, critic)
        self.models = nn.ModuleDict({role: copy.deepcopy(base) for role in ("policy", "critic")[: 1 + critic]})
        self.models["reference"] = base
        self.models.requires_grad_(False)
        for parameter in [*self.policy_parameters(), *self.critic_parameters()]:
            parameter.requires_grad_(True)
        self.eval()

    @contextmanager
    def acting(self, role: Role) -> Iterator[PreTrainedModel]:
        """The model of that role."""
        yield self.models[role]

    def policy_parameters(self) -> list[nn.Parameter]:
        """All weights of the policy."""
        return list(self.models["policy"].parameters())

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's backbone (its vocabulary head is never used) and the value head."""
        if self.value_head is None:
            return []
        return [*self.models["critic"].base_model.parameters(), *self.value_head.parameters()]

    def save_adapter(self, folder: Path) -> bool:
        """There is no adapter."""
        return False

    def merged_policy(self) -> PreTrainedModel:
        """A copy of the policy."""
        return copy.deepcopy(self.models["policy"])


def build_roles(
    model: ModelSettings, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 1, critic: bool = True
) -> Roles:
    """The roles on a base and its tokenizer (None: from the weights' folder); a seed gives the same new weights."""
    base = load_causal_lm(model)
    tokenizer = build_tokenizer(model) if tokenizer is None else tokenizer
    keep_freed_memory()
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, "roles"))
        if model.lora is None:
            return FullRoles(base, tokenizer, model.gradient_checkpointing, critic)
        prepacked = model.fast_cpu and model.prepack
        return LoraRoles(base, tokenizer, model.lora, model.gradient_checkpointing, critic, prepacked)
