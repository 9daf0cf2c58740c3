"""Settings of PPO that can be followed to the letter and lead nowhere, and such as nothing reads."""

from __future__ import annotations

from omegaconf import DictConfig

from src.config.errors import key_of
from src.config.value_types import said
from src.core.estimators import Estimator
from src.errors import ConfigError


def refuse_futile(config: DictConfig, estimator: Estimator) -> None:
    """Raise `ConfigError` in one sentence for a run whose policy, coefficient or metrics cannot be what was asked."""
    ppo, choices = config.ppo, config.choices
    if config.trainer.get("max_epochs") != 1:
        raise ConfigError(
            f"trainer.max_epochs={said(config.trainer.get('max_epochs'))}: a second pass would run the same iterations "
            f"again with a learning rate of 0: trainer.max_epochs=1, and ppo.num_iterations for a longer run"
        )
    if estimator.needs_values and ppo.critic_warmup >= ppo.num_iterations:
        raise ConfigError(
            f"ppo.critic_warmup={ppo.critic_warmup}: must be smaller than ppo.num_iterations ({ppo.num_iterations}), "
            f"or the policy never learns"
        )
    if choices.kl_controller == "adaptive" and ppo.kl_horizon <= 0.2 * ppo.batch_size:
        raise ConfigError(
            f"ppo.kl_horizon={ppo.kl_horizon}: must be greater than a fifth of ppo.batch_size ({ppo.batch_size}), or "
            f"the coefficient can become 0 in one iteration and stay so"
        )
    steps = ppo.epochs * -(-ppo.batch_size // ppo.minibatch_size)
    if choices.old_kl_controller == "doubling" and steps == 1:
        raise ConfigError(
            f"old_kl_controller=doubling: with one optimizer step per iteration KL(old || new) is measured before the "
            f"policy moves, so it is 0 and the coefficient halves for ever: ppo.epochs=2, or a ppo.minibatch_size "
            f"below ppo.batch_size ({ppo.batch_size})"
        )
    if ppo.ptx_coef == 0 and "ppo.ptx_max_tokens" in [key_of(override) for override in config.overrides]:
        raise ConfigError("ppo.ptx_coef=0 leaves the third loss out, so nothing reads ppo.ptx_max_tokens: remove it")
