"""Which option declares which keys, and the type of a run with the chosen ones joined in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import create_model

from src.config.schema.algorithm import (
    AdaptiveKL,
    Clip,
    ClippedValues,
    ConstantLength,
    Corrected,
    CorrectionLevel,
    Critic,
    DoublingOldKL,
    DualClip,
    EarlyStop,
    FixedKL,
    FixedOldKL,
    Gae,
    Gamma,
    GroupRelative,
    InBoth,
    InLoss,
    InReward,
    KLEstimator,
    NoEarlyStop,
    NoOldKL,
    OfAPrompt,
    RunningBaseline,
    SequenceClip,
    SetEos,
    SubtractEos,
    Trpo,
    ValueEstimator,
    WeightClip,
)
from src.config.schema.data import (
    Arithmetic,
    ColumnTable,
    DialogueTable,
    RatedSentences,
    ReasoningGym,
    Reviews,
    TextTable,
)
from src.config.schema.engines import VLLM, Local, VLLMServer
from src.config.schema.nodes import Node, Target
from src.config.schema.rewards import (
    AskedModel,
    ExactMatch,
    FunctionReward,
    HttpReward,
    KeywordReward,
    LearnedReward,
    LengthReward,
    MarkingModel,
    MixReward,
    NoArguments,
    NumericMatch,
    RegexReward,
    StepReward,
    TaskVerifier,
)
from src.config.schema.stages import RUNS, AdapterRewardModel, PretrainedRewardModel, Run, ScratchRewardModel
from src.config.schema.trainer import Ddp, Fsdp
from src.errors import ConfigError

# group -> (the node whose keys its options declare, option -> those keys); a group of `OWN` may have options of the
# user's own, which take any argument
OPTIONS: dict[str, tuple[str, dict[str, type[Node]]]] = {
    "model": ("model", {}),
    "data": (
        "data",
        {
            "custom": ColumnTable,  # first, as messages list the options in this order
            "custom_texts": TextTable,
            "reviews": Reviews,
            "arithmetic": Arithmetic,
            "movie_reviews": RatedSentences,
            "reasoning_gym": ReasoningGym,
            "imdb": TextTable,
            "hh_rlhf": DialogueTable,
            **dict.fromkeys(("gsm8k", "tldr", "ultrafeedback_binarized"), ColumnTable),
        },
    ),
    "reward": (
        "reward",
        {
            "learned": LearnedReward,
            "adapter": LearnedReward,
            "function": FunctionReward,
            "vader": NoArguments,
            "keyword": KeywordReward,
            "length": LengthReward,
            "regex": RegexReward,
            "exact_match": ExactMatch,
            "numeric": NumericMatch,
            "reasoning_gym": TaskVerifier,
            "mix": MixReward,
            "http": HttpReward,
            "judge": MarkingModel,
            "judge_pairs": AskedModel,
            "steps": StepReward,
        },
    ),
    "gold_reward": (
        "gold_reward",
        {"vader": NoArguments, "taste": MixReward, "exact_match": ExactMatch, "judge": MarkingModel},
    ),
    "reward_net": (
        "reward_model",
        {"scratch": ScratchRewardModel, "pretrained": PretrainedRewardModel, "adapter": AdapterRewardModel},
    ),
    "advantage": (
        "ppo",
        {
            **dict.fromkeys(("total_return", "reward_to_go", "baseline_batch", "remax", "reinforce_pp"), Gamma),
            **dict.fromkeys(("baseline_value", "td"), ValueEstimator),
            "gae": Gae,
            "baseline_running": RunningBaseline,
            "rloo": OfAPrompt,
            "group_relative": GroupRelative,
        },
    ),
    "value_loss": ("ppo", {"clipped": ClippedValues, "mse": Critic}),
    "policy_loss": (
        "ppo",
        {
            "reinforce": Node,
            "kl_penalty": Node,
            "clip": Clip,
            "dual_clip": DualClip,
            "gspo": SequenceClip,
            "cispo": WeightClip,
            "trpo": Trpo,
        },
    ),
    "kl": ("ppo", {"reward": InReward, "loss": InLoss, "both": InBoth, "none": Node}),
    "kl_estimator": ("ppo", dict.fromkeys(("k1", "k2", "k3", "exact"), KLEstimator)),
    "kl_controller": ("ppo", {"fixed": FixedKL, "adaptive": AdaptiveKL}),
    "old_kl": ("ppo", {"k3": Node, "exact": Node}),
    "old_kl_controller": ("ppo", {"none": NoOldKL, "fixed": FixedOldKL, "doubling": DoublingOldKL}),
    "aggregation": ("ppo", {"token_mean": Node, "sequence_mean": Node, "constant_length": ConstantLength}),
    "score_scaling": ("ppo", {"none": Node, "scale": Node, "normalize": Node}),
    "missing_eos": ("ppo", {"none": Node, "set": SetEos, "subtract": SubtractEos}),
    "early_stop": ("ppo", {"none": NoEarlyStop, "gold": EarlyStop}),
    "engine": ("rollout", {"local": Local, "vllm": VLLM, "vllm_server": VLLMServer}),
    "correction": ("rollout", {"none": Node, "truncate": Corrected, "mask": Corrected}),
    "correction_level": ("rollout", dict.fromkeys(("token", "sequence"), CorrectionLevel)),
    "trainer": ("trainer", {"default": Node, "ddp": Ddp, "fsdp": Fsdp}),
}
OWN = ("data", "reward", "gold_reward", "model", "trainer", "logger", "callbacks", "experiment", "preset")


def run_type(stage: str, choices: Mapping[str, str]) -> type[Run]:
    """The model of a stage's configuration with the keys of the chosen options joined in.

    Raises `ConfigError` for an option without a model, where the options of its group need one.
    """
    base = RUNS[stage]
    joined: dict[str, list[type[Node]]] = {}
    for group, option in choices.items():
        node, options = OPTIONS.get(group, ("", {}))
        if node in base.model_fields and option in options:
            joined.setdefault(node, []).append(options[option])
        elif node in base.model_fields and group not in OWN:
            raise ConfigError(
                f"{group}={option}: its keys are not declared; add it to OPTIONS in src/config/schema/options.py"
            )
    fields: dict[str, Any] = {}
    for node, classes in joined.items():
        declared = base.model_fields[node].annotation
        own = [declared] if isinstance(declared, type) and declared is not Target else []
        parts = tuple(dict.fromkeys([*(kind for kind in classes if kind is not Node), *own]))
        kind = parts[0] if len(parts) == 1 else create_model(f"Chosen_{node}", __base__=parts)
        fields[node] = (kind | None if node == "gold_reward" else kind, ...)
    return create_model(f"Chosen_{base.__name__}", __base__=base, **fields)
