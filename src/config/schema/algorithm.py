"""The parts of PPO that groups choose: one small model for each option."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from src.config.schema.nodes import Count, CountOrNone, Node, NonNegative, Positive, Share, Target, Typed, Unit


class Gamma(Node):
    """An estimator with a discount."""

    gamma: Unit


class ValueEstimator(Gamma):
    """An estimator with a critic."""

    critic_lam: Unit


class Gae(ValueEstimator):
    """Generalized advantage estimation."""

    lam: Unit


class RunningBaseline(Gamma):
    """The running mean of the returns."""

    baseline_decay: Share


class OfAPrompt(Node):
    """An estimator that compares the samples of a prompt."""

    needs_groups: ClassVar[bool] = True


class GroupRelative(OfAPrompt):
    """The scores of a prompt's samples, in units of their spread."""

    group_scale: bool


class Critic(Node):
    """Whatever a critic reads."""

    value_loss: Target
    critic_lr: NonNegative
    critic_warmup: CountOrNone


class ClippedValues(Critic):
    """The clipped squared error."""

    value_clip: Positive


class Clip(Node):
    """PPO-clip."""

    clip: Annotated[float, Field(gt=0, lt=1)]
    clip_low: Annotated[float, Field(gt=0, lt=1)]
    clip_high: Positive


class DualClip(Clip):
    """PPO-clip with a bound on negative advantages."""

    dual_clip: Annotated[float, Field(gt=1)]


class SequenceClip(Node):
    """GSPO."""

    clip_low: Annotated[float, Field(gt=0, lt=1)]
    clip_high: Positive


class WeightClip(Node):
    """CISPO."""

    clip_low: Annotated[float, Field(gt=0, le=1)]
    clip_high: Positive


class Trpo(Node):
    """A bound on KL(old || new)."""

    trust_region: Target
    max_kl: Positive
    damping: NonNegative
    cg_iterations: Count
    backtracks: Count


class InReward(Node):
    """kl=reward."""

    kl_in: Literal["reward"]


class InLoss(Node):
    """kl=loss."""

    kl_in: Literal["loss"]


class InBoth(Node):
    """kl=both."""

    kl_in: Literal["both"]


class KLEstimator(Node):
    """An estimate of the KL to the reference."""

    kl_estimator: Target


class FixedKL(Node):
    """A coefficient that stays."""

    kl_controller: Target
    kl_coef: NonNegative


class AdaptiveKL(Node):
    """A coefficient that is steered."""

    kl_controller: Target
    kl_coef: Positive
    kl_target: Positive
    kl_horizon: Count


class NoOldKL(Node):
    """No penalty on KL(old || new)."""

    old_kl_controller: Target


class FixedOldKL(NoOldKL):
    """A penalty on KL(old || new)."""

    old_kl_coef: NonNegative


class DoublingOldKL(NoOldKL):
    """A penalty that doubles and halves."""

    old_kl_coef: Positive
    old_kl_target: Positive


class ConstantLength(Node):
    """A divisor that is the same for all responses."""

    constant_length: Count


class NoEarlyStop(Node):
    """early_stop=none."""

    early_stop: None


class GoldStop(Typed):
    """A stop when gold falls while the score rises."""

    window: Count
    drop: NonNegative
    patience: Count


class EarlyStop(Node):
    """early_stop=gold."""

    early_stop: GoldStop


class SetEos(Node):
    """The score of an unfinished response."""

    missing_eos_score: float


class SubtractEos(Node):
    """What an unfinished response loses."""

    missing_eos_penalty: NonNegative


class Corrected(Node):
    """Weights for responses of another policy."""

    correction: Target
    correction_cap: Annotated[float, Field(gt=1)]


class CorrectionLevel(Node):
    """The ratio that they come from."""

    correction_level: Target
