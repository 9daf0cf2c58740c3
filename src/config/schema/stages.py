"""What each stage reads, and the whole configuration of a run."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from src.config.schema.algorithm import GoldStop
from src.config.schema.model import Lora, Model, Scratch
from src.config.schema.nodes import (
    Count,
    CountOrNone,
    FolderName,
    Length,
    Location,
    Node,
    NonNegative,
    Norm,
    Positive,
    Schedule,
    Target,
    Typed,
    Whole,
    figure_of,
)
from src.config.schema.trainer import Trainer


class Optimization(Node):
    """What the three stages have in common."""

    batch_size: Count
    lr: NonNegative
    lr_schedule: Schedule
    warmup: CountOrNone
    max_grad_norm: Norm
    log_every: Count


class SFT(Optimization):
    """Supervised fine-tuning."""

    steps: Count
    max_tokens: Length
    answers_only: bool
    eval_rows: Count
    weight_decay: NonNegative
    lora: Lora | None


class RewardModel(Optimization):
    """The reward model."""

    steps: Count
    max_tokens: Count
    weight_decay: NonNegative
    min_gap: NonNegative
    gap_edges: list[float]
    margin_coef: NonNegative
    lm_coef: NonNegative
    center_coef: NonNegative
    normalization_samples: Length | None
    normalization_max_new_tokens: Count

    net: ClassVar[Typed]  # every option of reward_net declares its own


class ScratchNet(Scratch):
    """A reward model of its own."""


class PretrainedNet(Typed):
    """A model of any architecture."""

    path: Location
    lora: Lora | None
    chat_template: bool


class AdapterNet(Typed):
    """An adapter on the policy's base."""

    lora: Lora


class ScratchRewardModel(Node):
    """reward_net=scratch."""

    net: ScratchNet


class PretrainedRewardModel(Node):
    """reward_net=pretrained."""

    net: PretrainedNet


class AdapterRewardModel(Node):
    """reward_net=adapter."""

    net: AdapterNet


class Samples(Node):
    """Tables of samples."""

    every: Count
    rows: Count


class HeldOut(Node):
    """Measuring the policy while it trains."""

    every: Count | None
    prompts: Count
    best: str | None
    patience: Count | None


class PPO(Optimization):
    """PPO. The objects that options choose come as `_target_` nodes; below are those that only some options bring."""

    num_iterations: Count
    epochs: Count
    minibatch_size: Count
    micro_batch_size: Count
    adam_eps: Positive
    entropy_coef: NonNegative
    ptx_coef: NonNegative
    ptx_max_tokens: Length
    early_stop_kl: Positive | None
    whiten_rewards: bool
    whiten_advantages: bool
    score_clip: Positive | None
    reward_timeout: Positive | None
    drop_failed: bool
    eval_prompts: Count
    held_out: HeldOut
    samples: Samples
    stop_on_alarm: bool
    advantage: Target
    policy_loss: Target
    old_kl: Target
    aggregation: Target
    score_scaling: Target
    missing_eos: Target

    early_stop: ClassVar[GoldStop | None] = None
    kl_in: ClassVar[Literal["reward", "loss", "both"] | None] = None
    needs_groups: ClassVar[bool] = False
    value_loss: ClassVar[Target | None] = None
    critic_lr: ClassVar[float | None] = None
    critic_warmup: ClassVar[int] = 0
    kl_estimator: ClassVar[Target | None] = None
    kl_controller: ClassVar[Target | None] = None
    old_kl_controller: ClassVar[Target | None] = None
    trust_region: ClassVar[Target | None] = None


class Rollout(Node):
    """Sampling."""

    samples_per_prompt: Count
    max_prompt_tokens: Count
    max_new_tokens: Count
    temperature: Positive
    scoring_batch_size: Count
    check_every: Count
    lag: Annotated[int, Field(ge=0, le=1)]

    engine: ClassVar[Node | None] = None
    correction: ClassVar[Target | None] = None


class Nonfinite(Node):
    """What happens to numbers that are not finite."""

    max_skipped_in_a_row: CountOrNone


class Checkpoint(Node):
    """Checkpoints."""

    every: Count
    keep: Count
    best_metric: str | None
    best_mode: Literal["max", "min"]


class Stop(Node):
    """Signals."""

    grace_seconds: Positive


class Callbacks(Node):
    """Callbacks; further ones are the user's own `_target_` nodes."""

    model_config = ConfigDict(extra="allow")

    checkpoint: Checkpoint
    stop: Stop


class Loggers(Node):
    """Loggers by name: `_target_` nodes, the user's own among them."""

    model_config = ConfigDict(extra="allow")


class Run(Node):
    """What every stage reads."""

    stage: Literal["sft", "reward", "ppo"]
    seed: Whole
    name: FolderName | None
    resume: str
    allow_config_change: bool
    log_dir: str
    run_dir: str | None
    sweep_metric: str | None
    nonfinite: Nonfinite
    model: Model
    data: Target
    gold_reward: Target | None
    trainer: Trainer
    logger: Loggers
    callbacks: Callbacks
    overrides: list[str]
    choices: dict[str, str]

    STAGE: ClassVar[str]

    def plain(self) -> dict[str, Any]:
        """The configuration in plain types, as `config.yaml` holds it: the keys that were composed, no others."""
        return self.model_dump(by_alias=True, exclude_unset=True)


FIGURES_OF_REWARD = r"reward_model\.(accuracy(_all_pairs|_gap_\w+)|calibration_error|length_correlation)"
FIGURES_OF_PPO = (
    r"(sft|ppo)\.(score|greedy_score|gold|kl|response_length|eos_fraction|grammatical|distinct)",
    r"improvement\.(score|gold)",
)


class SFTRun(Run):
    """The configuration of stage=sft."""

    sweep_metric: Annotated[str, figure_of("sft.nll_per_token")] | None
    sft: SFT


class RewardRun(Run):
    """The configuration of stage=reward."""

    sweep_metric: Annotated[str, figure_of("reward_model.accuracy", FIGURES_OF_REWARD)] | None
    reward_model: RewardModel


class PPORun(Run):
    """The configuration of stage=ppo."""

    sweep_metric: Annotated[str, figure_of("ppo.score", *FIGURES_OF_PPO)] | None
    reward: Target
    ppo: PPO
    rollout: Rollout


RUNS: dict[str, type[Run]] = {"sft": SFTRun, "reward": RewardRun, "ppo": PPORun}
