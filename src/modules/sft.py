"""The SFT stage: a language model is fine-tuned on the texts of the corpus."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from src.models.adapters import add_adapter
from src.models.forward import next_token_logprobs
from src.models.loading import load_causal_lm
from src.models.probe import probe
from src.models.settings import DTYPES, LoraSettings, ModelSettings
from src.modules.supervised import SupervisedModule
from src.utils.distributed import all_reduce_sum, map_over_ranks, row_shard
from src.utils.seeding import stream_seed
from src.utils.statistics import Figure, bootstrap_ratio


class SFTModule(SupervisedModule):
    """Next-token cross-entropy in nats per token, over the tokens of a text that count and its end token."""

    prefix = "sft"

    def __init__(
        self, model: ModelSettings, lora: LoraSettings | None, tokenizer: PreTrainedTokenizerBase, **optimization: Any
    ) -> None:
        net = build_lm(model, lora, tokenizer, optimization["seed"])
        super().__init__(net, tokenizer, **optimization)
        self.checkpointing = model.gradient_checkpointing
        self.test_rows: list[tuple[float, int]] = []  # (nats, tokens) of each held-out text

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """This rank's part of the mean over the tokens of the batch."""
        tokens = (batch["mask"][:, :-1] & batch["counted"][:, 1:]).sum()
        loss = -self._logprobs(batch, row_shard(len(batch["ids"])).index).sum() / tokens
        self.log("sft/loss", all_reduce_sum(loss.detach()), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Negative log-likelihood on held-out text, nats per token."""
        nats = self._nats(batch)
        self.log("sft/val_loss", nats.mean(), batch_size=len(nats))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Collect the negative log-likelihood and the number of predicted tokens of each held-out text."""
        tokens = (batch["mask"][:, :-1] & batch["counted"][:, 1:]).sum(dim=1).tolist()
        nats = self._nats(batch).double().split(tokens)
        self.test_rows += [(text.sum().item(), n) for text, n in zip(nats, tokens, strict=True)]

    def result(self) -> dict[str, dict[str, Figure]]:
        """The test results; the tokens of a text depend on each other, so the interval is over texts."""
        nats, tokens = zip(*self.test_rows, strict=True)
        return {"sft": {"nll_per_token": bootstrap_ratio(nats, tokens)}}

    def save(self, folder: Path) -> Path:
        """Write the fine-tuned model as a plain Hugging Face folder, an adapter merged in."""
        lm = copy.deepcopy(self.net).merge_and_unload() if isinstance(self.net, PeftModel) else self.net
        lm.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        return folder / "model"

    def _nats(self, batch: dict[str, Tensor]) -> Tensor:
        """Negative logprob of every token of the batch, (N,)."""
        rows = len(batch["ids"])
        return -torch.cat(map_over_ranks(lambda mine: self._logprobs(batch, mine.index), rows, in_step=True))

    def _logprobs(self, batch: dict[str, Tensor], rows: Tensor) -> Tensor:
        lm = self.net.get_base_model() if isinstance(self.net, PeftModel) else self.net
        ids, mask, counted = (batch[name][rows] for name in ("ids", "mask", "counted"))
        return next_token_logprobs(lm, ids, mask, counted, checkpointing=self.checkpointing)


def build_lm(
    model: ModelSettings, lora: LoraSettings | None, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel | PeftModel:
    """The model to fine-tune, with an adapter if `lora` is set; without a path, random weights, all trained."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, "weights"))
        if model.path is None:
            return _from_scratch(model, tokenizer)
        lm = load_causal_lm(model)
        probe(lm)
        lm.train()  # dropout as its configuration sets it, as for a model from scratch
        return lm if lora is None else add_adapter(lm, lora, "sft")


def _from_scratch(model: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    assert model.scratch is not None  # ModelSettings requires a path or scratch
    config = model.scratch.config_for(tokenizer)
    return AutoModelForCausalLM.from_config(
        config, dtype=DTYPES[model.dtype], attn_implementation=model.attn_implementation
    )
