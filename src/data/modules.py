"""One LightningDataModule per stage: corpus and tokenizer in, batches of tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from transformers import PreTrainedTokenizerBase

from src.core.padding import pad_left
from src.data.lengths import say_cut
from src.data.loaders import OrderedLoader, StreamLoader
from src.data.rows import rows_of
from src.data.tables import SPLITS
from src.data.texts import EncodedText, collate_texts, encoded_texts, text_stream
from src.errors import DataError, require
from src.models.text import encode_completions, encode_prompts, response_lengths, shorten
from src.types import Corpus, PreferencePair, PromptRow

Batch = dict[str, Any]


class TextData(LightningDataModule):
    """Texts for SFT."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        steps: int,
        eval_rows: int,
        max_tokens: int,
        seed: int,
        answers_only: bool = False,
    ) -> None:
        super().__init__()
        self.corpus, self.tokenizer = corpus, tokenizer
        self.batch_size, self.steps, self.eval_rows, self.max_tokens = batch_size, steps, eval_rows, max_tokens
        self.seed, self.answers_only = seed, answers_only

    def setup(self, stage: str) -> None:
        """Refuse a split without rows before anything is trained."""
        for split in SPLITS:
            rows_of(self.corpus, "texts", split)

    def train_dataloader(self) -> StreamLoader[EncodedText]:
        """Batches of `collate_texts`."""
        return text_stream(
            self.corpus, self.tokenizer, batch_size=self.batch_size, batches=self.steps, max_tokens=self.max_tokens,
            seed=self.seed, answers_only=self.answers_only,
        )  # fmt: skip

    def val_dataloader(self) -> OrderedLoader[EncodedText]:
        """The first `eval_rows` texts of the validation split."""
        return self._ordered("validation")

    def test_dataloader(self) -> OrderedLoader[EncodedText]:
        """The first `eval_rows` texts of the test split."""
        return self._ordered("test")

    def _ordered(self, split: str) -> OrderedLoader[EncodedText]:
        rows = encoded_texts(
            self.corpus, self.tokenizer, split, self.max_tokens, self.answers_only, self.eval_rows
        )  # fmt: skip
        return OrderedLoader(rows, partial(collate_texts, self.tokenizer.pad_token_id), self.batch_size)


class PairData(LightningDataModule):
    """Preference pairs for the reward model, tokenized by the reward model's tokenizer.

    `chat_template`: prompt and response go through its chat template; `lm_coef` > 0: batches also hold the mask of the
    chosen responses' tokens.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: bool,
        lm_coef: float,
        batch_size: int,
        steps: int,
        max_tokens: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.corpus, self.tokenizer = corpus, tokenizer
        self.chat_template, self.with_response_mask = chat_template, lm_coef > 0
        self.batch_size, self.steps, self.max_tokens, self.seed = batch_size, steps, max_tokens, seed

    def setup(self, stage: str) -> None:
        """Refuse a split without rows before anything is trained."""
        for split in SPLITS:
            rows_of(self.corpus, "pairs", split)

    def train_dataloader(self) -> StreamLoader[PreferencePair]:
        """Collated pairs."""
        return StreamLoader(
            self._pairs("train"), self.collate, batch_size=self.batch_size, batches=self.steps, seed=self.seed,
            stream="pairs",
        )  # fmt: skip

    def val_dataloader(self) -> OrderedLoader[PreferencePair]:
        """All pairs of the validation split."""
        return OrderedLoader(self._pairs("validation"), self.collate, self.batch_size)

    def test_dataloader(self) -> OrderedLoader[PreferencePair]:
        """All pairs of the test split."""
        return OrderedLoader(self._pairs("test"), self.collate, self.batch_size)

    def _pairs(self, split: str) -> Sequence[PreferencePair]:
        """The pairs of a split. Says how many of their texts are cut."""
        pairs = rows_of(self.corpus, "pairs", split)
        lengths = [len(row) for row in self._encoded(pairs)]
        say_cut(f"texts of the pairs of the split {split}", lengths, self.max_tokens, "beginning")
        return pairs

    def _encoded(self, pairs: Sequence[PreferencePair]) -> list[list[int]]:
        """The token ids of each prompt with its chosen response, then of each with its rejected response."""
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        return encode_completions(self.tokenizer, [pair.prompt for pair in pairs] * 2, sides, self.chat_template)

    def collate(self, pairs: list[PreferencePair], indices: list[int]) -> Batch:
        """{ids, mask (2B, S): all chosen, then all rejected; gap (B,), NaN where unknown}.

        With the language-model loss also {response_mask (B, S): the chosen responses' tokens, end token included}.
        """
        whole = self._encoded(pairs)
        rows = [shorten(row, self.max_tokens, self.tokenizer) for row in whole]
        ids, mask = pad_left(rows, self.tokenizer.pad_token_id)
        gap = torch.tensor([float("nan") if p.gap is None else p.gap for p in pairs])
        batch = {"ids": ids, "mask": mask, "gap": gap}
        if self.with_response_mask:
            prompts = [pair.prompt for pair in pairs]
            lengths = response_lengths(self.tokenizer, prompts, whole[: len(pairs)], self.chat_template)
            from_end = torch.arange(ids.shape[1], 0, -1)
            batch["response_mask"] = (from_end <= torch.tensor(lengths).unsqueeze(1)) & mask[: len(pairs)]
        return batch


class PromptData(LightningDataModule):
    """Prompts for PPO, and texts for the PPO-ptx loss when `ptx_coef` > 0."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 64,
        samples_per_prompt: int = 1,
        iterations: int = 100,
        eval_prompts: int = 512,
        eval_batch_size: int = 64,
        held_out_prompts: int = 64,
        max_prompt_tokens: int = 36,
        max_text_tokens: int = 128,
        ptx_coef: float = 0.0,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.corpus, self.tokenizer = corpus, tokenizer
        require(samples_per_prompt >= 1, "samples_per_prompt", samples_per_prompt, "at least 1")
        require(
            batch_size % samples_per_prompt == 0,
            "samples_per_prompt",
            samples_per_prompt,
            "a divisor of ppo.batch_size",
        )
        self.samples_per_prompt, self.prompts = samples_per_prompt, batch_size // samples_per_prompt
        self.batch_size, self.iterations = batch_size, iterations
        self.eval_prompts, self.eval_batch_size = eval_prompts, eval_batch_size
        self.held_out_prompts = held_out_prompts
        self.max_prompt_tokens, self.max_text_tokens = max_prompt_tokens, max_text_tokens
        self.with_texts, self.seed = ptx_coef > 0, seed

    def setup(self, stage: str) -> None:
        """Refuse a test split without rows before anything is trained."""
        rows_of(self.corpus, "prompts", "test")

    def train_dataloader(self) -> CombinedLoader:
        """Batches {prompts: fields of `src.types.Prompts`} and, with the PPO-ptx loss, {text: {ids, mask}}."""
        loaders: dict[str, Any] = {
            "prompts": StreamLoader(
                rows_of(self.corpus, "prompts", "train"), self._repeated, batch_size=self.prompts,
                batches=self.iterations, seed=self.seed, stream="prompts",
            )
        }  # fmt: skip
        if self.with_texts:
            loaders["text"] = text_stream(
                self.corpus, self.tokenizer, batch_size=self.batch_size, batches=self.iterations,
                max_tokens=self.max_text_tokens, seed=self.seed,
            )  # fmt: skip
        return CombinedLoader(loaders, "min_size")

    def test_dataloader(self) -> OrderedLoader[PromptRow]:
        """The first `eval_prompts` prompts of the test split."""
        return self._ordered("test", self.eval_prompts)

    def held_out_dataloader(self) -> OrderedLoader[PromptRow]:
        """The first `held_out_prompts` prompts of the validation split, to measure a policy that still trains."""
        return self._ordered("validation", self.held_out_prompts)

    def _ordered(self, split: str, prompts: int) -> OrderedLoader[PromptRow]:
        rows = rows_of(self.corpus, "prompts", split)[:prompts]
        return OrderedLoader(rows, lambda part, at: {"prompts": self.collate(part, at)}, self.eval_batch_size)

    def _repeated(self, rows: list[PromptRow], indices: list[int]) -> Batch:
        """Each prompt `samples_per_prompt` times in a row, with one group id."""
        times = self.samples_per_prompt
        batch = self.collate([row for row in rows for _ in range(times)], [i for i in indices for _ in range(times)])
        return batch | {"group_ids": batch["group_ids"] // times}

    def collate(self, rows: list[PromptRow], indices: list[int]) -> Batch:
        """The fields of `src.types.Prompts`; a prompt that is too long keeps its opening token and its end."""
        encoded = encode_prompts(self.tokenizer, [row.prompt for row in rows])
        for row, tokens in zip(rows, encoded, strict=True):
            if not tokens:
                raise DataError(f"prompt {row.prompt!r} has no tokens: every prompt needs at least one")
        short = [shorten(tokens, self.max_prompt_tokens, self.tokenizer) for tokens in encoded]
        ids, mask = pad_left(short, self.tokenizer.pad_token_id)
        return {
            "ids": ids,
            "mask": mask,
            "index": torch.tensor(indices),
            "group_ids": torch.arange(len(rows)),
            "texts": [row.prompt for row in rows],
            "metadata": [row.metadata for row in rows],
        }
