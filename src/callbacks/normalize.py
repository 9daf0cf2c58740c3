"""Normalizes a new reward model: scores of the SFT policy's samples get mean 0 and variance 1."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, Trainer

from src.core.padding import pad_left
from src.data.modules import PairData
from src.models.chat_template import adopt
from src.models.endings import endings
from src.models.loading import load_causal_lm, load_tokenizer, readable_length
from src.models.settings import ModelSettings
from src.models.text import encode_completions, encode_prompts, response_text, shorten
from src.modules.reward import RewardModule
from src.rewards.learned import score_rows
from src.rollout.sampling import Sampler
from src.types import Corpus
from src.utils.distributed import RowShard
from src.utils.seeding import generator


class NormalizeScores(Callback):
    """Replaces the score r by (r - mean) / std, with mean and std over samples of the SFT policy.

    Source: section 2.1 of Stiennon et al. (https://arxiv.org/abs/2009.01325), detail 4 of the N details. Without an SFT
    policy (`model.path` null) the corpus's texts are used instead of samples.
    """

    def __init__(self, model: ModelSettings, sampler: Sampler, samples: int, seed: int) -> None:
        self.model, self.sampler, self.samples, self.seed = model, sampler, samples, seed

    def on_train_end(self, trainer: Trainer, pl_module: RewardModule) -> None:
        """Score the samples and normalize."""
        data: PairData = trainer.datamodule
        if self.model.path is not None:
            prompts, responses = self._sft_samples(data.corpus, data.batch_size)
        else:
            responses = data.corpus.texts("train")[: self.samples]
            prompts = [""] * len(responses)
        net, tokenizer = pl_module.net, pl_module.tokenizer
        net.eval()
        whole = encode_completions(tokenizer, prompts, responses, net.chat_template)
        rows = [shorten(row, data.max_tokens, tokenizer) for row in whole]
        scores = score_rows(net.scores, rows, tokenizer.pad_token_id, 256, pl_module.device)
        net.normalize(float(scores.mean()), float(scores.std()))

    def _sft_samples(self, corpus: Corpus, batch_size: int) -> tuple[list[str], list[str]]:
        """Prompts and the policy's responses to them, `batch_size` at a time; they do not depend on that size.

        A prompt that does not fit into the context together with the longest response loses its beginning.
        """
        trusted = self.model.trust_remote_code
        lm = load_causal_lm(self.model)
        tokenizer = adopt(load_tokenizer(self.model.path or "", trusted=trusted), corpus)
        prompts = [row.prompt for row in corpus.prompts("train")[: self.samples]]
        limit, ends = readable_length(lm.config, tokenizer), endings(tokenizer, lm.generation_config)
        stop = torch.tensor(sorted(ends.ids))
        room = None if limit is None else limit - self.sampler.max_new_tokens
        rows = [shorten(row, room, tokenizer) for row in encode_prompts(tokenizer, prompts)]
        answers: list[str] = []
        for index in torch.arange(len(rows)).split(batch_size):
            ids, mask = pad_left([rows[i] for i in index], tokenizer.pad_token_id)
            draws, share = generator(self.seed, "normalize"), RowShard(index, len(rows))
            responses, kept, *_ = self.sampler.sample(lm, ids, mask, stop, tokenizer.pad_token_id, draws, share)
            batch = zip(ids, mask, responses, kept, strict=True)
            answers += [response_text(tokenizer, p[pm], r[rm], ends) for p, pm, r, rm in batch]
        return prompts, answers
