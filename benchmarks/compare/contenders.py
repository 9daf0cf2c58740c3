"""The contenders and what each of them trains; imports the standard library only."""

from __future__ import annotations

from dataclasses import dataclass

HALF = "model.dtype=bfloat16 trainer.precision=bf16-mixed"


@dataclass(frozen=True)
class Contender:
    """A program with its settings, and what its limit is computed from."""

    name: str
    title: str
    settings: str  # our overrides, in which TOP and FOLDER are filled in; for TRL words that by_trl knows
    trl: bool = False
    policy_lora: bool = True
    critic_lora: bool = True
    top_only: bool = False  # adapters in the top layers; the rest is computed once per experience
    critic_top: bool = False  # the same for the critic alone
    reward_lora: bool = False  # the reward model is an adapter on the base
    dtype: str = "float32"


CONTENDERS = (
    Contender("trl_lora", "TRL, LoRA policy, full critic", "policy", trl=True, critic_lora=False),
    Contender(
        "trl_lora_bf16", "TRL, the same, bfloat16", "policy bfloat16", trl=True, critic_lora=False, dtype="bfloat16"
    ),
    Contender("trl_both", "TRL, LoRA policy and LoRA critic", "policy critic", trl=True),
    Contender("trl_full", "TRL, every weight", "", trl=True, policy_lora=False, critic_lora=False),
    Contender("ours_lora", "ours, LoRA policy and critic", ""),
    Contender("ours_lora_bf16", "ours, the same, bfloat16", HALF, dtype="bfloat16"),
    Contender(
        "ours_critic_top", "ours, LoRA, the critic's in the top third of the layers", "model.lora.critic_layers=TOP",
        critic_top=True,
    ),
    Contender(
        "ours_adapter_reward", "ours, LoRA, reward model an adapter too",
        "reward=adapter reward.path=FOLDER/reward_adapter", reward_lora=True,
    ),
    Contender(
        "ours_top_bf16", "ours, LoRA in the top third of the layers, bfloat16", f"model.lora.layers=TOP {HALF}",
        top_only=True, dtype="bfloat16",
    ),
    Contender("ours_full", "ours, every weight", "model.lora=null", policy_lora=False, critic_lora=False),
)  # fmt: skip
ON_GPU = (
    Contender(
        "trl_lora", "TRL, LoRA policy, full critic", "policy bfloat16", trl=True, critic_lora=False, dtype="bfloat16"
    ),
    Contender("ours_lora", "ours, LoRA policy and critic", HALF, dtype="bfloat16"),
    Contender(
        "ours_top", "ours, LoRA in the top third of the layers", f"model.lora.layers=TOP {HALF}",
        top_only=True, dtype="bfloat16",
    ),
)  # fmt: skip
