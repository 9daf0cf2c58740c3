"""The builder of stage=ppo: from the configuration to roles, rewards, experience maker and module."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch.optim import Adam
from transformers import PreTrainedTokenizerBase

from src.callbacks.alarms import Alarms
from src.callbacks.curves import Curves
from src.callbacks.gold import GoldCurve
from src.callbacks.held_out import HeldOut
from src.callbacks.resources import Resources
from src.callbacks.rollout import RolloutCallback
from src.callbacks.run_page import RunPage
from src.callbacks.samples import ComparisonTable, SampleTable
from src.config.schema import PPO, PPORun
from src.data.modules import PromptData
from src.errors import ConfigError
from src.models.chat_template import adopt
from src.models.loading import build_tokenizer
from src.models.roles import build_roles
from src.modules.ppo import PPOModule
from src.modules.settings import PPOSettings
from src.modules.trpo import TRPOModule
from src.rewards.adapter import AdapterReward
from src.rewards.function import FunctionReward
from src.rollout.experience import ExperienceMaker, ReferenceKL
from src.rollout.kl_controller import FixedKL
from src.rollout.sampling import Sampler
from src.rollout.scoring import Scorer
from src.rollout.shaping import ScoreShaping
from src.stages.base import Stage
from src.stages.checks import check_ppo
from src.stages.objects import instantiate
from src.types import AnyReward, Corpus
from src.utils.launch import launched


class PPOStage(Stage[PPORun]):
    """Builds stage=ppo: what `PPOModule` learns with, from the configuration."""

    unit = "PPO iterations"

    def __init__(self, run: PPORun) -> None:
        super().__init__(run)
        self.maker = experience_maker(run)
        self.policy_loss = instantiate(run.ppo.policy_loss, "ppo.policy_loss")
        self.value_loss = instantiate(run.ppo.value_loss, "ppo.value_loss")
        self.old_kl = instantiate(run.ppo.old_kl, "ppo.old_kl")
        self.old_kl_controller = instantiate(run.ppo.old_kl_controller, "ppo.old_kl_controller") or FixedKL(0.0)
        self.aggregation = instantiate(run.ppo.aggregation, "ppo.aggregation")
        self.early_stop = instantiate(run.ppo.early_stop, "ppo.early_stop")
        self.trust_region = instantiate(run.ppo.trust_region, "ppo.trust_region")
        self.gold_reward: AnyReward | None = instantiate(run.gold_reward, "gold_reward")
        self.reward: AnyReward | None = self._reward()

    @property
    def optimization(self) -> PPO:
        """The block `ppo`."""
        return self.run.ppo

    def check(self) -> None:
        """Check trainer, estimator and models, and call a function that is the reward once."""
        super().check()
        if isinstance(self.gold_reward, AdapterReward):
            raise ConfigError("gold_reward: an adapter on the policy's base is no gold score: use its model/ folder")
        check_ppo(self.run)
        if self.run.trainer.strategy is None or launched():  # the process that only starts others loads nothing
            for reward in (self.reward, self.gold_reward):
                if isinstance(reward, FunctionReward):
                    self.maker.scorer.try_out(reward)

    def check_training(self) -> None:
        """Check the rollout engine too."""
        super().check_training()
        self.maker.engine.check()

    def set_paths(self, model: str | None = None, reward: str | None = None) -> None:
        """Set the folders, and make the reward if it needed one."""
        super().set_paths(model, reward)
        self.reward = self.reward if self.reward is not None else self._reward()

    def own_callbacks(self, folder: Path) -> list[Callback]:
        """The rollout, its tables and plots."""
        samples = self.run.ppo.samples
        return [
            RolloutCallback(self.maker, self.run.seed, self.run.rollout.lag),
            Alarms(self.run.ppo.stop_on_alarm),
            *self._held_out(),
            Resources(),
            SampleTable(str(folder / "samples"), samples.every, samples.rows),
            ComparisonTable(str(folder)),
            Curves(str(folder)),
            GoldCurve(str(folder)),
            RunPage(str(folder), samples.every),
            *([self.early_stop] if self.early_stop is not None else []),
        ]

    def _held_out(self) -> list[Callback]:
        """The measurement of the policy while it trains, if it is wanted."""
        held_out = self.run.ppo.held_out
        if held_out.every is None:
            return []
        return [HeldOut(self.maker, self.run.seed, held_out.every, held_out.best, held_out.patience)]

    def build(self, corpus: Corpus, folder: Path) -> tuple[PPOModule, PromptData]:
        """The module with its roles, and the corpus's prompts."""
        run, ppo = self.run, self.run.ppo
        tokenizer = adopt(build_tokenizer(self.model, corpus), corpus)
        has_critic = ppo.value_loss is not None
        module = self._module_class()(
            roles=build_roles(self.model, tokenizer, run.seed, critic=has_critic),
            reward=self.reward,
            gold_reward=self.gold_reward,
            settings=settings_of(run),
            policy_loss=self.policy_loss,
            value_loss=self.value_loss,
            old_kl=self.old_kl,
            old_kl_controller=self.old_kl_controller,
            reference_kl=self.maker.reference_kl.estimator,
            aggregation=self.aggregation,
            policy_optimizer=partial(Adam, fused=True, lr=ppo.lr, eps=ppo.adam_eps),
            critic_optimizer=partial(Adam, fused=True, lr=ppo.critic_lr, eps=ppo.adam_eps) if has_critic else None,
            lr_schedule=self.lr_schedule(ppo.num_iterations),
            nonfinite=self.guard(folder),
            seed=run.seed,
        )
        return module, self.prompt_data(corpus, tokenizer, ppo.eval_prompts)

    def prompt_data(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, eval_prompts: int) -> PromptData:
        """The prompts of a corpus, of which `eval_prompts` are held out for the evaluation."""
        run, ppo = self.run, self.run.ppo
        return PromptData(
            corpus,
            tokenizer,
            batch_size=ppo.batch_size,
            samples_per_prompt=run.rollout.samples_per_prompt,
            iterations=ppo.num_iterations,
            eval_prompts=eval_prompts,
            # each batch of the evaluation has its own random stream, so this size decides what is drawn;
            # rollout.scoring_batch_size is chosen by memory and must not change it
            eval_batch_size=ppo.batch_size,
            held_out_prompts=ppo.held_out.prompts,
            max_prompt_tokens=run.rollout.max_prompt_tokens,
            max_text_tokens=ppo.ptx_max_tokens,
            ptx_coef=ppo.ptx_coef,
            seed=run.seed,
        )

    def _reward(self) -> AnyReward | None:
        """The reward; None before the folder of its model is set."""
        # a reward without the key `path` needs no folder: "given" stands for any value but None
        return None if getattr(self.run.reward, "path", "given") is None else instantiate(self.run.reward, "reward")

    def _module_class(self) -> Any:
        return PPOModule if self.trust_region is None else partial(TRPOModule, trust_region=self.trust_region)


def experience_maker(run: PPORun) -> ExperienceMaker:
    """The experience maker of the run."""
    ppo, rollout = run.ppo, run.rollout
    return ExperienceMaker(
        sampler=Sampler(rollout.max_new_tokens, rollout.temperature),
        scorer=Scorer(ppo.reward_timeout, ppo.drop_failed),
        shaping=ScoreShaping(
            instantiate(ppo.score_scaling, "ppo.score_scaling"),
            ppo.score_clip,
            instantiate(ppo.missing_eos, "ppo.missing_eos"),
        ),
        reference_kl=ReferenceKL(
            in_reward=ppo.kl_in in ("reward", "both"),
            in_loss=ppo.kl_in in ("loss", "both"),
            estimator=instantiate(ppo.kl_estimator, "ppo.kl_estimator"),
        ),
        kl_controller=instantiate(ppo.kl_controller, "ppo.kl_controller") or FixedKL(0.0),
        advantage=instantiate(ppo.advantage, "ppo.advantage"),
        whiten_rewards=ppo.whiten_rewards,
        whiten_advantages=ppo.whiten_advantages,
        batch_size=rollout.scoring_batch_size,
        engine=instantiate(rollout.engine, "rollout.engine"),
        check_every=rollout.check_every,
        correction=instantiate(rollout.correction, "rollout.correction"),
    )


def settings_of(run: PPORun) -> PPOSettings:
    """The settings of the updates on one batch of experience."""
    ppo = run.ppo
    return PPOSettings(
        batch_size=ppo.batch_size,
        epochs=ppo.epochs,
        minibatch_size=ppo.minibatch_size,
        micro_batch_size=ppo.micro_batch_size,
        max_grad_norm=ppo.max_grad_norm,
        entropy_coef=ppo.entropy_coef,
        ptx_coef=ppo.ptx_coef,
        early_stop_kl=ppo.early_stop_kl,
        critic_warmup=ppo.critic_warmup,
        temperature=run.rollout.temperature,
    )
