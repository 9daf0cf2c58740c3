"""The reward model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lightning.pytorch import Callback
from torch.optim import AdamW

from src.callbacks.normalize import NormalizeScores
from src.callbacks.reward_report import RewardReport
from src.config.schema import RewardModel, RewardRun
from src.data.modules import PairData
from src.models.reward_choices import RewardChoice
from src.modules.reward import RewardModule
from src.rollout.sampling import Sampler
from src.stages.base import Stage
from src.stages.checks import check_reward
from src.stages.objects import instantiate
from src.types import Corpus


class RewardStage(Stage[RewardRun]):
    """stage=reward."""

    unit = "reward-model steps"

    @property
    def optimization(self) -> RewardModel:
        """The block `reward_model`."""
        return self.run.reward_model

    @property
    def net_choice(self) -> RewardChoice:
        """The choice of reward model; an adapter gets the model settings of its base."""
        node = self.run.reward_model.net
        choice = instantiate(node, "reward_model.net")
        return choice(model=self.model) if node.partial else choice

    def check(self) -> None:
        """Check trainer, reward model and SFT policy."""
        super().check()
        check_reward(self.run, self.net_choice)

    def own_callbacks(self, folder: Path) -> list[Callback]:
        """The normalization of scores, and a plot of the margins."""
        settings, report = self.run.reward_model, RewardReport(str(folder))
        if settings.normalization_samples is None:
            return [report]
        sampler = Sampler(settings.normalization_max_new_tokens, temperature=1.0)
        return [NormalizeScores(self.model, sampler, settings.normalization_samples, self.run.seed), report]

    def build(self, corpus: Corpus, folder: Path) -> tuple[RewardModule, PairData]:
        """The reward model, and the corpus's preference pairs in its tokens."""
        run, settings, choice = self.run, self.run.reward_model, self.net_choice
        tokenizer = choice.build_tokenizer(corpus)
        data = PairData(
            corpus,
            tokenizer,
            chat_template=choice.chat_template,
            lm_coef=settings.lm_coef,
            batch_size=settings.batch_size,
            steps=settings.steps,
            max_tokens=settings.max_tokens,
            seed=run.seed,
        )
        module = RewardModule(
            choice,
            tokenizer,
            min_gap=settings.min_gap,
            gap_edges=settings.gap_edges,
            margin_coef=settings.margin_coef,
            center_coef=settings.center_coef,
            lm_coef=settings.lm_coef,
            optimizer=partial(AdamW, fused=True, lr=settings.lr, weight_decay=settings.weight_decay),
            lr_schedule=self.lr_schedule(settings.steps),
            max_grad_norm=settings.max_grad_norm,
            seed=run.seed,
            nonfinite=self.guard(folder),
        )
        return module, data
