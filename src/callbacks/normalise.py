"""Sets gain and bias of a fresh reward model: the SFT policy's own samples then score mean 0, variance 1."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from src.core.padding import pad_left
from src.models.loading import load_causal_lm, load_tokenizer
from src.models.scalar_head import normalise_scores
from src.models.settings import ModelSettings
from src.models.text import decode
from src.modules.reward import RewardModule
from src.rewards.learned import score_texts
from src.rollout.sampling import Sampler
from src.types import Corpus
from src.utils.streams import generator


class NormaliseScores(Callback):
    """Source: section 2.1 of Stiennon et al. (https://arxiv.org/abs/2009.01325), detail 4 of the N details.

    Without an SFT policy (`model.path` null) the corpus's own texts stand for its samples.
    """

    def __init__(self, model: ModelSettings, sampler: Sampler, samples: int, seed: int) -> None:
        self.model, self.sampler, self.samples, self.seed = model, sampler, samples, seed

    def on_train_end(self, trainer: Trainer, pl_module: RewardModule) -> None:
        """Score the samples and change the head."""
        corpus: Corpus = trainer.datamodule.corpus
        texts = self._sft_samples(corpus) if self.model.path is not None else corpus.texts("train")[: self.samples]
        pl_module.eval()
        scores = score_texts(pl_module.net, pl_module.tokenizer, texts, batch_size=256)
        normalise_scores(pl_module.net, float(scores.mean()), float(scores.std()))

    def _sft_samples(self, corpus: Corpus) -> list[str]:
        lm, tokenizer = load_causal_lm(self.model), load_tokenizer(self.model.path or "")
        prompts = [row.prompt for row in corpus.prompts("train")[: self.samples]]
        ids, mask = pad_left(tokenizer(prompts, return_attention_mask=False)["input_ids"], tokenizer.pad_token_id)
        stop = ids.new_tensor([tokenizer.eos_token_id])
        draws = generator(self.seed, "normalise")
        responses, response_mask, _, _ = self.sampler.sample(lm, ids, mask, stop, tokenizer.pad_token_id, draws)
        rows = zip(ids, mask, responses, response_mask, strict=True)
        return [decode(tokenizer, ids.new_tensor([*p[pm].tolist(), *r[rm].tolist()])) for p, pm, r, rm in rows]
