"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.optim import AdamW

from src.config.schema import SFT, SFTRun
from src.data.modules import TextData
from src.models.chat_template import adopt
from src.models.loading import build_tokenizer
from src.modules.sft import SFTModule
from src.stages.base import Stage
from src.stages.checks import check_sft
from src.stages.objects import instantiate
from src.types import Corpus


class SFTStage(Stage[SFTRun]):
    """stage=sft."""

    unit = "SFT steps"

    @property
    def optimization(self) -> SFT:
        """The block `sft`."""
        return self.run.sft

    def __init__(self, run: SFTRun) -> None:
        super().__init__(run)
        # an update merged into weights of few bits would be rounded away when the next stage quantizes the sum
        self.model = replace(self.model, quantize=None)

    def check(self) -> None:
        """Check trainer and model."""
        super().check()
        check_sft(self.run)

    def build(self, corpus: Corpus, folder: Path) -> tuple[SFTModule, TextData]:
        """A language model, loaded or made from scratch, and the corpus's texts."""
        run, settings = self.run, self.run.sft
        tokenizer = adopt(build_tokenizer(self.model, corpus), corpus)
        data = TextData(
            corpus,
            tokenizer,
            batch_size=settings.batch_size,
            steps=settings.steps,
            eval_rows=settings.eval_rows,
            max_tokens=settings.max_tokens,
            seed=run.seed,
            answers_only=settings.answers_only,
        )
        module = SFTModule(
            self.model,
            instantiate(settings.lora, "sft.lora"),
            tokenizer,
            optimizer=partial(AdamW, fused=True, lr=settings.lr, weight_decay=settings.weight_decay),
            lr_schedule=self.lr_schedule(settings.steps),
            max_grad_norm=settings.max_grad_norm,
            seed=run.seed,
            nonfinite=self.guard(folder),
        )
        return module, data
