"""Base of the SFT and reward stages: one optimizer, one schedule, clipping, a random stream for each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from src.modules.checkpoint_filter import keep_trainable, require_trainable
from src.utils.distributed import all_reduce_sum, clip_gradients, sum_gradients
from src.utils.nonfinite import FiniteGuard
from src.utils.seeding import stream_seed


class SupervisedModule(LightningModule):
    """Automatic optimization of all parameters of `net` that require a gradient.

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
        nonfinite: FiniteGuard | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds trainable tensors only
        self.net, self.tokenizer, self.make_optimizer, self.lr_schedule = net, tokenizer, optimizer, lr_schedule
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.nonfinite = nonfinite or FiniteGuard(max_skipped_in_a_row=0, folder=None)
        self._batch: dict[str, Tensor] = {}
        self._loss = 0.0

    def configure_optimizers(self) -> dict[str, Any]:
        """One optimizer; the schedule moves every step."""
        optimizer = self.make_optimizer([p for p in self.net.parameters() if p.requires_grad])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_schedule(optimizer), "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout for this step."""
        torch.manual_seed(stream_seed(self.seed, "dropout", self.global_rank, batch_idx))
        self.log("step", float(batch_idx + 1))
        self._batch = batch

    def on_before_backward(self, loss: Tensor) -> None:
        """Keep the loss of the whole batch."""
        self._loss = all_reduce_sum(loss.detach()).item()

    def on_after_backward(self) -> None:
        """Sum the gradients of the ranks: the gradient of the whole batch."""
        sum_gradients(self.net.parameters())

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log validation metrics in the row of the last step."""
        self.log("step", float(self.trainer.fit_loop.total_batch_idx + 1), batch_size=1)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip once per optimizer step, and log the norm before clipping.

        If loss or norm is not finite, the gradients are removed: the step changes neither weights nor moments. Raises
        `NonFiniteError` at the limit of such steps.
        """
        norm = clip_gradients(self.net.parameters(), self.max_grad_norm)
        self.log(f"{self.prefix}/grad_norm", norm)
        numbers = {f"{self.prefix}/loss": self._loss, f"{self.prefix}/grad_norm": norm.item()}
        step = self.trainer.fit_loop.total_batch_idx + 1
        if not self.nonfinite.passes(self.prefix, step, numbers, self._texts):
            optimizer.zero_grad()
        self.log("train/skipped_steps", float(self.nonfinite.skipped))

    def _texts(self) -> list[dict[str, Any]]:
        """The texts of the present batch."""
        rows = zip(self._batch["ids"], self._batch["mask"], strict=True)
        return [{"text": self.tokenizer.decode(ids[mask])} for ids, mask in rows]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable tensors only, and the number of skipped steps."""
        keep_trainable(self, checkpoint)
        checkpoint["nonfinite"] = self.nonfinite.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint with missing or unexpected tensors; restore the number of skipped steps."""
        require_trainable(self, checkpoint)
        self.nonfinite.load_state_dict(checkpoint["nonfinite"])
