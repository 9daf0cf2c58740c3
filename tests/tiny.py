"""Makers shared by the tests: a two-layer GPT-2 with random weights, ragged records, a scripted reward, a real fit."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from src.callbacks.rollout import RolloutCallback
from src.core.aggregation import token_mean
from src.core.estimators import GAE
from src.core.kl import SampledKL, k1, k3
from src.core.policy_losses import ClippedSurrogate
from src.core.value_losses import ClippedSquaredError
from src.data.modules import PromptData
from src.data.tokenizers import word_level
from src.models.roles import Roles, build_roles
from src.models.settings import LoraSettings, ModelSettings
from src.modules.ppo import PPOModule
from src.modules.settings import PPOSettings
from src.rollout.experience import ExperienceMaker, ReferenceKL
from src.rollout.kl_controller import FixedKL
from src.rollout.sampling import Sampler
from src.rollout.scoring import Scorer
from src.rollout.shaping import IgnoreMissingEos, NoScaling, ScoreShaping
from src.types import Experience, PreferencePair, PromptRow, Prompts, Rollout

TEXTS = [
    "the film was long and dull .",
    "the plot was bright and the cast was great .",
    "a bad film , a great cast .",
    "we liked the plot and the end .",
    "they loved a dull end , we did not .",
    "great .",
]
PROMPTS = ["the film", "a", "we liked the plot", "they", "the plot was bright and", "a bad", "great", "we"]
FAST_CPU = os.environ.get("TEST_FAST_CPU", "true") == "true"  # `model.fast_cpu` of every model that is loaded here
PAD, EOS, FIRST_WORD = 0, 1, 3  # ids of `word_level`: pad, eos, unk, then words
LORA = LoraSettings(rank=3, alpha=6, dropout=0.0, targets="all-linear")

# peft 0.21 corrects the setting by itself for GPT-2's Conv1D layers, and says so
CONV1D = "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"
# transformers 5.23 has a new name for gradient_checkpointing_enable
CHECKPOINTING = "ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning"
# Lightning wonders at modules in eval mode; here they are so on purpose
EVAL_MODE = r"ignore:Found \d+ module\(s\) in eval mode at the start of training:UserWarning"
FOREIGN_WARNINGS = [pytest.mark.filterwarnings(w) for w in (CONV1D, CHECKPOINTING, EVAL_MODE)]


def tokenizer() -> PreTrainedTokenizerBase:
    """A word-level tokenizer of `TEXTS`, padding on the left."""
    return word_level(TEXTS)


def gpt2_config(**changes: Any) -> GPT2Config:
    """Two layers of width 16, with weights large enough that no two tokens are equally likely, and no dropout."""
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer()), "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 48}
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**(sizes | ids | dropout | {"initializer_range": 0.3} | changes))


def seeded(make: Any, seed: int) -> Any:
    """What `make()` returns under a seed of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def write_lm(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A random causal language model and its tokenizer in a folder."""
    model = seeded(lambda: GPT2LMHeadModel(gpt2_config(**changes)), seed)
    nn.init.normal_(model.transformer.ln_f.bias, std=0.1, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def write_reward_model(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A random sequence classifier with one output, and its tokenizer, in a folder."""
    model = seeded(lambda: GPT2ForSequenceClassification(gpt2_config(num_labels=1, **changes)), seed)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def model_settings(path: str | None, lora: LoraSettings | None = LORA, **changes: Any) -> ModelSettings:
    """Settings of a model in a folder."""
    plain: dict[str, Any] = {
        "name": "tiny",
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "scratch": None,
        "fast_cpu": FAST_CPU,
    }
    return ModelSettings(path=path, lora=lora, **(plain | changes))


def make_roles(
    path: str, lora: LoraSettings | None = LORA, *, spread: float = 0.0, critic: bool = True, **changes: Any
) -> Roles:
    """Roles on a folder; `spread` > 0 moves policy and critic away from the reference, each by noise of its own.

    The value head, which starts at 0, is made random, so that values tell one state from another.
    """
    roles = build_roles(model_settings(path, lora, **changes), tokenizer(), seed=5, critic=critic)
    noise = torch.Generator().manual_seed(11)
    with torch.no_grad():
        if roles.value_head is not None:
            roles.value_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
        if spread:
            for parameter in [*roles.policy_parameters(), *roles.critic_parameters()]:
                parameter += spread * torch.randn(parameter.shape, generator=noise).to(parameter)
    return roles


def make_prompts(texts: list[str]) -> Prompts:
    """Prompts padded on the left by a loop of our own."""
    rows = [tokenizer()(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    return Prompts(
        ids=torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        mask=torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows]),
        index=torch.arange(len(rows)),
        group_ids=torch.arange(len(rows)),
        texts=tuple(texts),
        metadata=tuple({"row": i} for i in range(len(rows))),
    )


def ragged_rollout(rows: int = 7, prompt: int = 5, response: int = 6, seed: int = 0) -> Rollout:
    """Random tokens; prompts of 1..`prompt` and responses of 1..`response` tokens, every second one ended by EOS."""
    draws = torch.Generator().manual_seed(seed)

    def lengths(longest: int) -> list[int]:
        drawn = torch.randint(1, longest + 1, (rows,), generator=draws).tolist()
        return [longest, 1, *drawn[2:]] if rows > 2 else [longest, *drawn[1:]]

    def words(*shape: int) -> Tensor:
        return torch.randint(FIRST_WORD, len(tokenizer()), shape, generator=draws)

    prompt_ids, response_ids = words(rows, prompt), words(rows, response)
    prompt_mask = torch.zeros(rows, prompt, dtype=torch.bool)
    response_mask = torch.zeros(rows, response, dtype=torch.bool)
    finished = torch.arange(rows) % 2 == 0
    for i, (p, r) in enumerate(zip(lengths(prompt), lengths(response)[::-1], strict=True)):
        prompt_mask[i, prompt - p :] = True
        response_mask[i, :r] = True
        if finished[i]:
            response_ids[i, r - 1] = EOS
    return Rollout(
        prompt_ids=prompt_ids.where(prompt_mask, PAD),
        prompt_mask=prompt_mask,
        response_ids=response_ids.where(response_mask, PAD),
        response_mask=response_mask,
        behavior_logprobs=torch.zeros(rows, response),
        finished=finished,
        prompt_index=torch.arange(rows),
        group_ids=torch.arange(rows),
        prompts=tuple(f"p{i}" for i in range(rows)),
        responses=tuple(f"r{i}" for i in range(rows)),
        metadata=tuple({} for _ in range(rows)),
        policy_version=0,
    )


def ragged_experience(rollout: Rollout, old_logprobs: Tensor, old_values: Tensor, seed: int = 0) -> Experience:
    """Experience around given logprobs and values, with random advantages and returns; 0 outside the mask."""
    draws = torch.Generator().manual_seed(seed)
    mask = rollout.response_mask

    def noise() -> Tensor:
        return torch.randn(mask.shape, generator=draws).to(old_logprobs) * mask

    return Experience(
        rollout=rollout,
        old_logprobs=old_logprobs * mask,
        ref_logprobs=old_logprobs * mask + noise(),
        old_values=old_values * mask,
        scores=torch.randn(len(mask), generator=draws),
        rewards=noise(),
        advantages=noise(),
        returns=noise(),
    )


class ScriptedReward:
    """A number in [-1, 1] that depends on the text alone; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str], list[dict[str, Any]]]] = []

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        self.calls.append((prompts, responses, metadata))
        return [sum(map(ord, p + r)) % 17 / 8 - 1 for p, r in zip(prompts, responses, strict=True)]


class TinyCorpus:
    """The same few rows in every split."""

    def texts(self, split: str) -> list[str]:
        return TEXTS

    def prompts(self, split: str) -> list[PromptRow]:
        return [PromptRow(text, {"row": i}) for i, text in enumerate(PROMPTS)]

    def pairs(self, split: str) -> list[PreferencePair]:
        return [PreferencePair(prompt="the film", chosen=" was great .", rejected=" was bad .", gap=0.5)]

    def quality(self, texts: list[str]) -> dict[str, list[float]]:
        return {}


KL_IN_REWARD = ReferenceKL(in_reward=True, in_loss=False, estimator=SampledKL(k1))


def make_maker(**changes: Any) -> ExperienceMaker:
    """An experience maker with settings that leave nothing neutral but the score."""
    temperature = changes.pop("temperature", 1.0)
    plain: dict[str, Any] = {
        "sampler": Sampler(max_new_tokens=6, temperature=temperature),
        "scorer": Scorer(timeout=None, drop_failed=False),
        "shaping": ScoreShaping(NoScaling(), score_clip=None, missing_eos=IgnoreMissingEos()),
        "reference_kl": KL_IN_REWARD,
        "kl_controller": FixedKL(0.1),
        "advantage": GAE(gamma=1.0, lam=0.95, critic_lam=0.95),
        "whiten_rewards": False,
        "whiten_advantages": True,
        "batch_size": 3,
    }
    return ExperienceMaker(**(plain | changes))


def make_module(roles: Roles, **changes: Any) -> PPOModule:
    """A PPO module on given roles; `changes` go to its settings or, where named below, to itself."""
    mine: dict[str, Any] = {
        "lr": 0.01,
        "critic_lr": 0.02,
        "iterations": 2,
        "optimizer": partial(torch.optim.Adam, eps=1e-5),
        "reward": ScriptedReward(),
        "policy_loss": ClippedSurrogate(0.2, 0.2),
        "value_loss": ClippedSquaredError(0.2),
        "old_kl": SampledKL(k3),
        "old_kl_controller": FixedKL(0.0),
        "reference_kl": KL_IN_REWARD.estimator,
        "aggregation": token_mean,
    }
    mine |= {name: changes.pop(name) for name in list(changes) if name in mine}
    settings: dict[str, Any] = {
        "batch_size": 8,
        "epochs": 2,
        "minibatch_size": 4,
        "micro_batch_size": 3,
        "max_grad_norm": 1.0,
        "entropy_coef": 0.0,
        "ptx_coef": 0.0,
        "early_stop_kl": None,
        "critic_warmup": 0,
        "temperature": 1.0,
    }
    return PPOModule(
        roles,
        mine["reward"],
        PPOSettings(**(settings | changes)),
        policy_loss=mine["policy_loss"],
        old_kl=mine["old_kl"],
        old_kl_controller=mine["old_kl_controller"],
        reference_kl=mine["reference_kl"],
        value_loss=mine["value_loss"],
        aggregation=mine["aggregation"],
        policy_optimizer=partial(mine["optimizer"], lr=mine["lr"]),
        critic_optimizer=partial(mine["optimizer"], lr=mine["critic_lr"]),
        lr_schedule=partial(get_linear_schedule_with_warmup, num_warmup_steps=0, num_training_steps=mine["iterations"]),
        seed=3,
    )


class Recorder(Logger):
    """Keeps what is logged: `rows` is a list of (step, numbers)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = "recorder"
    version = ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((int(step or 0), dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def by_step(self) -> dict[int, dict[str, float]]:
        """All numbers of a step together, without clocks."""
        table: dict[int, dict[str, float]] = {}
        for step, row in self.rows:
            table.setdefault(step, {}).update({k: v for k, v in row.items() if not k.startswith("time/")})
        return table


class Inject(Callback):
    """Hands the module an experience made elsewhere, in place of the rollout callback."""

    def __init__(self, experience: Experience, text: dict[str, Tensor] | None = None) -> None:
        self.experience, self.text = experience, text

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        batch["experience"] = self.experience
        if self.text is not None:
            batch["text"] = self.text


def fit(
    module: PPOModule,
    tmp_path: Path,
    *,
    maker: ExperienceMaker | None = None,
    iterations: int = 2,
    samples_per_prompt: int = 1,
    seed: int = 3,
    lag: int = 0,
    callbacks: tuple[Callback, ...] = (),
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[Recorder, Trainer]:
    """A real Lightning fit on the tiny corpus; with the rollout callback when a maker is given.

    `options` are the Trainer's own (`accelerator`, `devices`, `strategy`).
    """
    settings = module.settings
    data = PromptData(
        TinyCorpus(),
        module.roles.tokenizer,
        batch_size=settings.batch_size,
        samples_per_prompt=samples_per_prompt,
        iterations=iterations,
        eval_prompts=4,
        eval_batch_size=3,
        max_prompt_tokens=8,
        max_text_tokens=12,
        ptx_coef=settings.ptx_coef,
        seed=seed,
    )
    recorder = Recorder()
    rollout = (RolloutCallback(maker, seed=seed, lag=lag),) if maker is not None else ()
    trainer = Trainer(
        max_epochs=1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        logger=[recorder],
        callbacks=[*rollout, *callbacks],
        **({"accelerator": "cpu", "devices": 1} | options),
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return recorder, trainer


def snapshot(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Copies, to compare with later."""
    return [parameter.detach().clone() for parameter in parameters]


def same_bits(before: list[Tensor], after: list[nn.Parameter]) -> bool:
    """Whether no bit changed."""
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def plain_logprobs(model: Any, rollout: Rollout, temperature: float = 1.0) -> list[list[float]]:
    """log pi(a_t | s_t), row by row, from whole forwards without padding: token at place i from logits at i - 1."""
    result = []
    for row in range(len(rollout.response_ids)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
        places = range(len(prompt), len(prompt) + len(response))
        result.append(
            [torch.log_softmax(logits[i - 1], 0)[token].item() for i, token in zip(places, response, strict=True)]
        )
    return result


def rows_of(x: Tensor, mask: Tensor) -> list[list[float]]:
    """The counted elements of each row."""
    return [row[m].tolist() for row, m in zip(x, mask, strict=True)]


def assert_rows_close(actual: list[list[float]], expected: list[list[float]], tolerance: float) -> None:
    """Ragged comparison, with the largest difference in the message."""
    assert [len(row) for row in actual] == [len(row) for row in expected]
    largest = max(abs(a - e) for x, y in zip(actual, expected, strict=True) for a, e in zip(x, y, strict=True))
    assert largest <= tolerance, f"largest difference {largest}"


def plain_model(roles: Any, role: str) -> PreTrainedModel:
    """A copy of the whole model in that role, driven through peft or transformers alone."""
    import copy

    if hasattr(roles, "models"):
        return copy.deepcopy(roles.models[role]).eval()
    model = copy.deepcopy(roles.peft).eval()
    if role == "reference":
        return model.unload()
    model.set_adapter(role)
    return model
