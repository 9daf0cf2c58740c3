"""The memory of PPO by role and phase, estimated before weights are loaded.

The architecture is built from its configuration on fake tensors, which have shapes but no memory. Each phase runs on
them with the code of training, and the bytes of the tensors that live at once are counted, so no coefficient of any
architecture is needed here. Not counted: memory that allocators keep in reserve, libraries' workspaces, mixed precision
of the trainer, the PPO-ptx loss, exact KLs, the kept output of layers below all adapters, rollout engines of others;
under `trainer=fsdp` the model is counted whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)

from src.kernels.fast_layers import layers_to_pack, with_fast_layers
from src.models.adapters import add_adapter, lora_config
from src.models.distribution import TokenDistribution
from src.models.forward import gradient_checkpointing
from src.models.loading import attention_of, name_backbone
from src.models.quantized import quantize
from src.models.scalar_head import value_head
from src.models.settings import DTYPES, ModelSettings

BASE = "base (is the reference)"
PREPACKED = "base, prepacked for the CPU"
SAVING = "saving: the merged copy (in main memory)"
LOADING = "loading: the weights before they are quantized (in main memory)"
ADAM_STATES = 2  # first and second moment of each trained number, in its own dtype


@dataclass(frozen=True)
class Workload:
    """Sizes of one PPO iteration: sequences and tokens."""

    rollout_rows: int  # sampled at a time
    scoring_rows: int  # scored at a time
    update_rows: int  # in a micro-batch
    prompt_tokens: int
    response_tokens: int

    @property
    def tokens(self) -> int:
        """The longest sequence."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: `weights`, `gradients` and `optimizer` by role, `phases` by phase.

    Weights and optimizer states stay. A phase counts the most that lives at once on top of them, gradients included;
    phases follow one another, so the peak is what stays plus the largest phase.
    """

    weights: dict[str, int]
    gradients: dict[str, int]
    optimizer: dict[str, int]
    phases: dict[str, int]

    @property
    def lasting(self) -> int:
        """Bytes of weights and optimizer states."""
        return sum(self.weights.values()) + sum(self.optimizer.values())

    @property
    def peak(self) -> int:
        """Most bytes at once when everything is in main memory."""
        return self.lasting + max(self.phases.values())

    @property
    def on_gpu(self) -> int:
        """Most bytes at once on a GPU, where saving copies to main memory and no weights are prepacked."""
        phases = [size for phase, size in self.phases.items() if phase not in (SAVING, LOADING)]
        return self.lasting + max(phases) - self.weights.get(PREPACKED, 0)


def estimate(
    config: PretrainedConfig, model: ModelSettings, rewards: Sequence[PretrainedConfig], load: Workload, critic: bool
) -> MemoryEstimate:
    """The memory of PPO on this architecture; `rewards` are those of the reward models."""
    with torch.device("meta"):  # shapes, but neither memory nor values
        lm = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[model.dtype], attn_implementation=attention_of(config, model.attn_implementation),
        ).eval()  # fmt: skip
        name_backbone(lm)
        whole = size(lm.parameters())
        quantize(lm, model.quantize)
        if model.fast_cpu:
            with_fast_layers(lm)
        weights, trained = _roles(lm, model, critic)
        scorers = [AutoModelForSequenceClassification.from_config(reward).eval() for reward in rewards]
    for scorer in scorers if model.fast_cpu else ():
        with_fast_layers(scorer)
    copied = whole + (sum(trained.values()) if model.lora is not None else 0)
    if model.fast_cpu and model.prepack and model.lora is not None and (layers := layers_to_pack(lm.base_model)):
        weights[PREPACKED] = size(layer.weight for layer in layers)
    with FakeTensorMode():
        for net in (lm, *scorers):
            _give_fake_memory(net)
        phases = {
            "rollout: KV cache, next-token scores": _rollout(lm, load),
            "scoring: hidden states, vocabulary scores": _scoring(lm, load),
            "update of the policy: activations, gradients": _update(lm, model, load, trained["policy"]),
        }
        if critic:
            phases["update of the critic: activations, gradients"] = _critic_update(lm, model, load, trained["critic"])
        if scorers:
            weights["reward"] = sum(size(scorer.parameters()) for scorer in scorers)
            passes = [partial(_backbone, scorer, load.scoring_rows, load.tokens) for scorer in scorers]
            phases["reward model: hidden states"] = max(map(peak_of, passes))  # one after another
    phases |= {SAVING: copied} | ({LOADING: whole - weights[BASE]} if model.quantize is not None else {})
    return MemoryEstimate(weights, trained, {role: ADAM_STATES * size for role, size in trained.items()}, phases)


def _roles(lm: PreTrainedModel, model: ModelSettings, critic: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the weights of each role, and of the weights that it trains."""
    base, backbone = size(lm.parameters()), size(lm.base_model.parameters())
    head = size(value_head(lm.get_output_embeddings().weight.shape[1]).parameters()) if critic else 0
    if model.lora is None:
        trained = {"policy": base} | ({"critic": backbone + head} if critic else {})
        weights = {BASE: base, "policy": base} | ({"critic": base + head} if critic else {})
        return weights, trained
    peft = add_adapter(lm, model.lora, "policy")
    if critic:
        peft.add_adapter("critic", lora_config(model.lora.of_critic, lm))
    peft.set_adapter("policy")
    roles = ("policy", "critic") if critic else ("policy",)
    trained = {role: size(p for name, p in peft.named_parameters() if f".{role}." in name) for role in roles}
    if critic:
        trained["critic"] += head
    return {BASE: base, **trained}, trained


def _rollout(lm: PreTrainedModel, load: Workload) -> int:
    """Sampling: the larger of the prefill and of the last step, when the cache is full."""
    rows, steps = load.rollout_rows, load.tokens - 1
    full = DynamicCache(config=lm.config)
    with torch.no_grad():
        prefill = peak_of(lambda: _next_token(lm, rows, load.prompt_tokens, DynamicCache(config=lm.config), 0))
        with LiveBytes() as counter:
            _next_token(lm, rows, steps, full, 0)
            counter.peak = counter.live  # count the full cache, not the pass that filled it here
            _next_token(lm, rows, 1, full, steps)
    return max(prefill, counter.peak)


def _next_token(lm: PreTrainedModel, rows: int, new: int, cache: DynamicCache, before: int) -> Tensor:
    """The probabilities of the next token, as the sampler computes them."""
    logits = lm(
        **_inputs(rows, new, before), past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits[:, -1]  # fmt: skip
    return logits.float().exp()


def _scoring(lm: PreTrainedModel, load: Workload) -> int:
    """Log-probabilities of the policy, then of the reference while the policy's hidden states are kept."""

    def run() -> None:
        policy = _distribution(lm, load.scoring_rows, load)
        policy.logprobs()
        _distribution(lm, load.scoring_rows, load).logprobs()

    with torch.no_grad():
        return peak_of(run)


def _update(lm: PreTrainedModel, model: ModelSettings, load: Workload, trained: int) -> int:
    """Forward and backward of a micro-batch, or the step with a temporary copy of each trained tensor if larger."""

    def run() -> None:
        with gradient_checkpointing(lm, model.gradient_checkpointing):
            distribution = _distribution(lm, load.update_rows, load)
        logprobs, entropy = distribution.logprobs_and_entropy()
        (logprobs.sum() + entropy.sum()).backward()

    if model.lora is None:
        lm.requires_grad_(True)
    try:
        return max(peak_of(run), 2 * trained)
    finally:
        lm.zero_grad()


def _critic_update(lm: PreTrainedModel, model: ModelSettings, load: Workload, trained: int) -> int:
    """The same for values, which need no vocabulary; the policy's adapter has the size of the critic's."""
    head = value_head(lm.get_output_embeddings().weight.shape[1])

    def run() -> None:
        with gradient_checkpointing(lm, model.gradient_checkpointing):
            hidden = _backbone(lm, load.update_rows, load.tokens)
        head(hidden[:, load.prompt_tokens - 1 : -1].float()).sum().backward()

    try:
        return max(peak_of(run), 2 * trained)
    finally:
        lm.zero_grad()


def _distribution(lm: PreTrainedModel, rows: int, load: Workload) -> TokenDistribution:
    hidden = _backbone(lm, rows, load.tokens)[:, load.prompt_tokens - 1 : -1]
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    return TokenDistribution(hidden.flatten(0, 1), lm.get_output_embeddings(), ids.flatten(), ids == 0, 1.0)


def _backbone(lm: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    return lm.base_model(**_inputs(rows, tokens, 0), use_cache=False).last_hidden_state


def _inputs(rows: int, new: int, before: int) -> dict[str, Tensor]:
    """Token ids and positions of `new` tokens, and their attention mask, which fakes cannot compute themselves."""
    ids = torch.zeros(rows, new, dtype=torch.int64)
    return {
        "input_ids": ids,
        "position_ids": ids,
        "attention_mask": torch.ones(rows, 1, new, before + new, dtype=torch.bool),
    }


def size(tensors: Any) -> int:
    """Bytes of the tensors, each counted once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _give_fake_memory(net: nn.Module) -> None:
    """Turn meta tensors into fake CPU tensors, so that the CPU's kernels decide what is kept for backward."""
    made: dict[int, nn.Parameter] = {}
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(_fake(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), fake)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _fake(buffer)


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def peak_of(run: Callable[[], Any]) -> int:
    """The most bytes that tensors made by `run` occupy at once."""
    with LiveBytes() as counter:
        run()
    return counter.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the new storages among its results."""
        result = func(*args, **(kwargs or {}))
        old = {id(x.untyped_storage()) for x in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            self._note(old, tensor)
        return result

    def _note(self, old: set[int], tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in old or key in self._known:
            return
        occupied = storage.nbytes()
        self.live += occupied
        self.peak = max(self.peak, self.live)

        def freed(_: Any) -> None:
            self.live -= occupied
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation; torch's own walk takes several times as long."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list | dict):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)
