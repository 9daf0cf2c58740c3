"""The least floating-point operations of one iteration, by phase and role.

A forward pass of n layers over N tokens: width H, A pairs of a token and one it attends to (itself included):

    layers(n) = n (2 * 12 H^2 * N + 4 H * A)          queries, keys, values and output 4 H^2, MLP 8 H^2; A is causal
    lora(n) = n * 2 * r (H + 3 H) * N                 rank r on c_attn, H -> 3 H
    head = 2 V H * R                                  R response tokens

Backward: once the forward for gradients of activations, once more for gradients of trained weights; through attention,
which has no weights, twice the forward. The input of the lowest adapted layer needs no gradient: minus 2 H (3 H + r) N.
Real tokens only, no padding, nothing recomputed. A rollout caches keys and values and does not read its last token. Not
counted: norms, activations, softmax, value and score heads, optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.compare.contenders import Contender
from benchmarks.compare.workload import VOCABULARY, Workload

FORMULA = " ".join((__doc__ or "").split())


@dataclass(frozen=True)
class Pass:
    """Passes over sequences of these lengths, prompt and response together."""

    workload: Workload
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """N."""
        return sum(self.lengths)

    def matmuls(self, layers: int) -> int:
        """Operations of the layers' weights."""
        return layers * 24 * self.workload.width**2 * self.tokens

    def attention(self, layers: int) -> int:
        """Operations of attention scores and weighted sums."""
        return layers * 4 * self.workload.width * sum(n * (n + 1) // 2 for n in self.lengths)

    def lora(self, layers: int) -> int:
        """Operations of both factors of the adapters."""
        return layers * 8 * self.workload.rank * self.workload.width * self.tokens

    def head(self) -> int:
        """Operations of the vocabulary head at the response tokens."""
        return 2 * VOCABULARY * self.workload.width * self.workload.rows * self.workload.new_tokens

    def forward(self, layers: int, *, lora: bool = False, head: bool = False) -> int:
        """A forward pass without gradients."""
        plain = self.matmuls(layers) + self.attention(layers)
        return plain + (self.lora(layers) if lora else 0) + (self.head() if head else 0)

    def learn(self, layers: int, *, lora: bool, head: bool) -> int:
        """A forward and backward pass."""
        weights = 2 if lora else 3  # frozen weights have no gradient
        body = weights * self.matmuls(layers) + 3 * self.attention(layers)
        adapters = 3 * self.lora(layers) - self.below() if lora else 0
        return body + adapters + (weights * self.head() if head else 0)

    def below(self) -> int:
        """What is saved below the lowest adapted layer: its input needs no gradient."""
        width = self.workload.width
        return 2 * width * (3 * width + self.workload.rank) * self.tokens


def decoded_bytes(contender: Contender, workload: Workload) -> int:
    """Bytes that decoding must read: all weights per token of the longest response, and each row's keys and values.

    The base's weights with the tied embedding as head are 12 H^2 n + V H numbers; keys and values 2 H n numbers per
    earlier token. Not counted: adapters, norms, writes, and the pass over the prompts.
    """
    width, layers, new = workload.width, workload.layers, workload.new_tokens
    weights = layers * 12 * width**2 + VOCABULARY * width
    so_far = sum(prompt + token for prompt in workload.prompt_lengths for token in range(1, new))
    size = 2 if contender.dtype == "bfloat16" else 4
    return size * (weights * (new - 1) + 2 * layers * width * so_far)


def flops(contender: Contender, workload: Workload) -> dict[str, dict[str, int]]:
    """phase -> role -> operations."""
    prompts, layers = workload.prompt_lengths, workload.layers
    sampled = Pass(workload, [p + workload.new_tokens - 1 for p in prompts])
    read = Pass(workload, [p + workload.new_tokens for p in prompts])
    top = workload.top if contender.top_only else layers
    critics = workload.top if contender.critic_top else top  # the layers below are the reference's
    adapted, critic = contender.policy_lora, contender.critic_lora
    cached = sampled.forward(layers, head=True) + (sampled.lora(top) if adapted else 0)
    score = {
        "reference": read.forward(top, head=True),
        "critic": read.forward(critics, lora=critic),
        "reward": read.forward(layers, lora=contender.reward_lora),
    }
    if not contender.trl:  # TRL reuses the sampler's log-probabilities
        score["policy"] = read.forward(top, lora=adapted, head=True)
    if contender.top_only:
        score["trunk"] = read.forward(layers - top)
    train = {
        "policy": workload.epochs * read.learn(top, lora=adapted, head=True),
        "critic": workload.epochs * read.learn(critics, lora=critic, head=False),
    }
    return {"rollout": {"policy": cached}, "score": score, "train": train}
