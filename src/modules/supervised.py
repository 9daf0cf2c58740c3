"""What the SFT and the reward stage share: one optimizer, one schedule, clipping, a random stream for each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from src.modules.trainable import keep_trainable, require_trainable
from src.utils.ranks import sum_gradients
from src.utils.streams import stream_seed


class SupervisedModule(LightningModule):
    """Automatic optimization of everything in `net` that asks for a gradient.

    A batch is the same on every rank; `training_step` returns this rank's part of the loss over the whole of it.
    """

    prefix: ClassVar[str]  # of the logged names

    def __init__(
        self,
        net: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler],
        max_grad_norm: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds trainable tensors only
        self.net, self.tokenizer, self.make_optimizer, self.lr_schedule = net, tokenizer, optimizer, lr_schedule
        self.max_grad_norm, self.seed = max_grad_norm, seed

    def configure_optimizers(self) -> dict[str, Any]:
        """One optimizer; the schedule moves every step."""
        optimizer = self.make_optimizer([p for p in self.net.parameters() if p.requires_grad])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_schedule(optimizer), "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout draws from a stream of its own for each step."""
        torch.manual_seed(stream_seed(self.seed, "dropout", self.global_rank, batch_idx))
        self.log("step", float(batch_idx + 1))

    def on_after_backward(self) -> None:
        """The gradient of the whole batch is the sum of what the ranks have found."""
        sum_gradients(self.net.parameters())

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """What is measured belongs to the row of the last step."""
        self.log("step", float(self.trainer.fit_loop.total_batch_idx + 1), batch_size=1)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip once per optimizer step, and log the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.max_grad_norm)
        self.log(f"{self.prefix}/grad_norm", norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable tensors only."""
        keep_trainable(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks or exceeds what is trained."""
        require_trainable(self, checkpoint)
