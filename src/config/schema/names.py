"""Names that people give, and what there is instead."""

from __future__ import annotations

OPEN = (
    *("trainer", "callbacks", "logger", "hydra"),
    *("reward.parts", "reward.weights", "gold_reward.parts", "gold_reward.weights"),
    *("reward.step", "rollout.engine.options"),
)
MEANT = {
    "ppo.iterations": "ppo.num_iterations",
    "ppo.steps": "ppo.num_iterations",
    "ppo.clip_range": "ppo.clip",
    "ppo.cliprange": "ppo.clip",
    "ppo.gae_lambda": "ppo.lam",
    "ppo.beta": "ppo.kl_coef",
    "ppo.init_kl_coef": "ppo.kl_coef",
    "ppo.target_kl": "ppo.early_stop_kl (ends an iteration's epochs), or kl_controller=adaptive with ppo.kl_target",
    "ppo.num_epochs": "ppo.epochs",
    "ppo.lm_coef": "ppo.ptx_coef",
    "sft.epochs": "sft.steps",
    "reward_model.epochs": "reward_model.steps",
    "rollout.num_generations": "rollout.samples_per_prompt",
    "rollout.max_length": "rollout.max_new_tokens",
    "rollout.batch_size": "rollout.scoring_batch_size",
    "model.lora_r": "model.lora.rank",
    "model.lora.r": "model.lora.rank",
}
MEANT |= {f"{stage}.learning_rate": f"{stage}.lr" for stage in ("sft", "reward_model", "ppo")}
WHOLE = (
    "tokens are drawn from the whole distribution, whose log-probabilities are trained; rollout.temperature shapes it"
)
BASES = "model.quantize=nf4 or int8 holds the frozen base in 4 or 8 bits"
LOST = (
    "a reward acts through the sampled token alone, and most of the gradient of this KL would be lost; kl=reward needs "
    "k1, kl=both takes exact or k3"
)
KL_LOST: dict[tuple[str | None, str | None], str] = {  # place and estimator that optimize something else: why
    **{("reward", estimator): LOST for estimator in ("k2", "k3", "exact")},
    ("loss", "k1"): "the expected gradient of k1 is zero, so kl=loss needs k2, k3 or exact",
    ("both", "k1"): "kl=both needs another, as in the loss its expected gradient is zero: kl=reward",
    ("both", "k2"): "kl=both needs another, as it is biased: exact or k3",
}
KL_UNEVEN = (  # not with kl=both
    *("aggregation=sequence_mean", "advantage=reinforce_pp", "advantage=group_relative"),
    *("correction=truncate", "correction=mask"),
)
UNEVEN = (
    "the KL's parts in reward and loss are weighed differently, so kl=both would optimize something else: kl=reward"
)
NOT_OF_TRAINER = {  # arguments of Lightning's Trainer that mean something else here, and what does it instead
    **dict.fromkeys(
        ("max_steps", "min_steps", "max_epochs", "min_epochs", "limit_train_batches", "overfit_batches"),
        "the length of a stage is ppo.num_iterations, sft.steps or reward_model.steps",
    ),
    "max_time": "a run that is stopped (Ctrl-C, or SIGTERM by a scheduler) saves a checkpoint and resumes",
    "fast_dev_run": "experiment=quick runs every part of a stage in seconds",
    **dict.fromkeys(
        ("gradient_clip_val", "gradient_clip_algorithm"),
        "gradients are clipped by ppo.max_grad_norm, sft.max_grad_norm and reward_model.max_grad_norm",
    ),
    "accumulate_grad_batches": "ppo.micro_batch_size accumulates gradients; a step takes ppo.minibatch_size rows",
    **dict.fromkeys(
        ("val_check_interval", "check_val_every_n_epoch", "limit_val_batches", "limit_test_batches"),
        "held-out data are measured once, at the end: ppo.eval_prompts, sft.eval_rows",
    ),
    **dict.fromkeys(("callbacks", "logger"), "the groups callbacks and logger hold them"),
    **dict.fromkeys(("enable_checkpointing", "default_root_dir"), "callbacks.checkpoint and log_dir decide"),
    **dict.fromkeys(("strategy", "num_nodes"), "several processes train by trainer=ddp or trainer=fsdp"),
    **dict.fromkeys(
        ("use_distributed_sampler", "reload_dataloaders_every_n_epochs", "barebones", "inference_mode", "plugins"),
        "the loaders and loops of this project do not allow it",
    ),
    "log_every_n_steps": "ppo.log_every, sft.log_every and reward_model.log_every decide",
    **dict.fromkeys(("num_sanity_val_steps", "enable_model_summary"), "it is always off"),
}
WHY_NOT = {
    **{f"trainer.{name}": why for name, why in NOT_OF_TRAINER.items() if name not in ("strategy", "num_nodes")},
    **dict.fromkeys(("rollout.top_p", "rollout.top_k", "rollout.repetition_penalty"), WHOLE),
    **dict.fromkeys(("model.load_in_4bit", "model.load_in_8bit", "model.quantization"), BASES),
    "ppo.vf_coef": "policy and critic have an optimizer each: ppo.critic_lr",
    "ppo.value_coef": "policy and critic have an optimizer each: ppo.critic_lr",
    "run_dir": "the folder of a run follows from log_dir, stage and name",
}

QUOTES = "a value with = , : or spaces needs quotes in quotes: \"key='a=b'\""

PLAIN = {  # what pydantic says -> what it means
    "^(Input should be|Value error, must be) ": "",
    "a valid integer": "a whole number",
    "a valid (number|list)": r"a \1",
    "a valid string": "a text",
    "a valid boolean": "true or false",
    "a valid dictionary.*": "a group of keys",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}
