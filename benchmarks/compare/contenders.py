"""Who is compared, and what of the work each one does; needs the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass

HALF = "model.dtype=bfloat16 trainer.precision=bf16-mixed"


@dataclass(frozen=True)
class Contender:
    """A program with its settings, and what the limit is to be counted by."""

    name: str
    title: str
    settings: str  # overrides of ours, where TOP and FOLDER are filled in; lora or full of TRL's
    trl: bool = False
    policy_lora: bool = True
    critic_lora: bool = True
    top_only: bool = False  # adapters in the top layers, the rest computed once for each experience
    reward_lora: bool = False  # the reward model is an adapter on the base
    dtype: str = "float32"


CONTENDERS = (
    Contender("trl_lora", "TRL, LoRA policy, full critic", "lora", trl=True, critic_lora=False),
    Contender("trl_full", "TRL, every weight", "full", trl=True, policy_lora=False, critic_lora=False),
    Contender("ours_lora", "ours, LoRA policy and critic", ""),
    Contender("ours_lora_bf16", "ours, the same, bfloat16", HALF, dtype="bfloat16"),
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
    Contender("trl_lora", "TRL, LoRA policy, full critic", "lora", trl=True, critic_lora=False, dtype="bfloat16"),
    Contender("ours_lora", "ours, LoRA policy and critic", HALF, dtype="bfloat16"),
    Contender(
        "ours_top", "ours, LoRA in the top third of the layers", f"model.lora.layers=TOP {HALF}",
        top_only=True, dtype="bfloat16",
    ),
)  # fmt: skip
