"""Choices of reward model: from scratch, pretrained, or an adapter on the policy's base."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.errors import ModelError
from src.models.accounting import load_whole
from src.models.chat_template import adopt, own_template
from src.models.fingerprint import base_fingerprint, tokenizer_fingerprint
from src.models.loading import UNUSABLE, absent, load_causal_lm, load_config, load_tokenizer
from src.models.probe import probe
from src.models.reward_adapter import AdapterFacts
from src.models.reward_net import RewardNet, adapted
from src.models.settings import LoraSettings, ModelSettings, ScratchSettings
from src.types import Corpus
from src.utils.hub import for_hub
from src.utils.seeding import stream_seed
from src.utils.terminal import say

PATH_KEY = "reward_model.net.path"


@dataclass(frozen=True)
class FromScratch(ScratchSettings):
    """A small separate model and its tokenizer, both made from the corpus."""

    chat_template = False
    lora = None

    def architecture(self) -> PretrainedConfig:
        """Its architecture, without weights."""
        return self.config()

    def build_tokenizer(self, corpus: Corpus) -> PreTrainedTokenizerBase:
        """A tokenizer made from the corpus."""
        return self.tokenizer(corpus.texts("train"))

    def has_lm_head(self) -> bool:
        """It has no vocabulary head."""
        return False

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int, with_lm_head: bool) -> RewardNet:
        """Random weights; the same seed gives the same weights."""
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(seed, "weights"))
            config = self.config_for(tokenizer, num_labels=1)
            return RewardNet(AutoModelForSequenceClassification.from_config(config))


@dataclass(frozen=True)
class Pretrained:
    """A model of any architecture from a folder or the hub, with its own tokenizer; trained whole, or with `lora`.

    A language model gets a new score head; a sequence classifier with one output keeps its own. `chat_template`:
    prompt and response are formatted with the tokenizer's chat template.
    """

    path: str
    lora: LoraSettings | None
    chat_template: bool

    def architecture(self) -> PretrainedConfig:
        """Its architecture, without weights."""
        return load_config(self.path, PATH_KEY)

    def build_tokenizer(self, corpus: Corpus) -> PreTrainedTokenizerBase:
        """The tokenizer in the weights' folder."""
        tokenizer = load_tokenizer(self.path, PATH_KEY)
        if self.chat_template and own_template(tokenizer) is None:
            raise ModelError(f"reward_model.net.chat_template=true: there is no chat template at {self.path!r}")
        return tokenizer

    def has_lm_head(self) -> bool:
        """Whether it is a decoder saved as a language model."""
        config = self.architecture()
        kinds = config.architectures or []
        return is_decoder(config) and any(k.endswith(("ForCausalLM", "LMHeadModel")) for k in kinds)

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int, with_lm_head: bool) -> RewardNet:
        """The weights, a new score head if there is none, and the vocabulary head `with_lm_head`."""
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(seed, "weights"))
            new: list[str] = []
            try:
                classifier = load_whole(
                    AutoModelForSequenceClassification, for_hub(self.path), PATH_KEY, new=new,
                    num_labels=1, trust_remote_code=False,
                )  # fmt: skip
            except UNUSABLE as error:
                raise absent(self.path, error, PATH_KEY) from error
            if new:
                say(f"{self.path}: new weights, not trained yet: {', '.join(new)}")
            classifier = classifier.float()
            lm_head = self._lm_head(classifier) if with_lm_head else None
            net = classifier if self.lora is None else adapted(classifier, self.lora)
        return RewardNet(net, lm_head=lm_head, chat_template=self.chat_template)

    def _lm_head(self, classifier: PreTrainedModel) -> nn.Module:
        """The vocabulary head of the same folder: the classifier's embedding if the model ties them, else frozen."""
        lm = load_whole(AutoModelForCausalLM, self.path, PATH_KEY, trust_remote_code=False).float().eval()
        lm.name_or_path = self.path
        probe(lm)
        head = lm.get_output_embeddings()
        if head.weight is lm.get_input_embeddings().weight:
            head.weight = classifier.get_input_embeddings().weight
            return head
        return head.requires_grad_(False)


@dataclass(frozen=True)
class SharedBaseAdapter:
    """A LoRA adapter and a score head on the model that PPO starts from, with its tokenizer."""

    model: ModelSettings
    lora: LoraSettings

    chat_template = False  # it reads the policy's tokens

    def architecture(self) -> PretrainedConfig | None:
        """The base's architecture, also before the base is trained."""
        if self.model.path is None:
            return self.model.scratch.config() if self.model.scratch is not None else None
        return load_config(self.model.path, trusted=self.model.trust_remote_code)

    def build_tokenizer(self, corpus: Corpus) -> PreTrainedTokenizerBase:
        """The tokenizer in the base's folder, as PPO reads it."""
        return adopt(load_tokenizer(self.model.path or "", trusted=self.model.trust_remote_code), corpus)

    def has_lm_head(self) -> bool:
        """The base is a language model."""
        return True

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int, with_lm_head: bool) -> RewardNet:
        """The base, loaded as PPO loads it, with a new adapter and head and the base's fingerprint."""
        lm = load_causal_lm(self.model)
        probe(lm)
        facts = AdapterFacts(base_fingerprint(lm.base_model), tokenizer_fingerprint(tokenizer))
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(seed, "weights"))
            net = adapted(scoring(lm), self.lora)
        lm_head = lm.get_output_embeddings().requires_grad_(False) if with_lm_head else None
        return RewardNet(net, lm_head=lm_head, facts=facts, checkpointing=self.model.gradient_checkpointing)


RewardChoice = FromScratch | Pretrained | SharedBaseAdapter


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether the architecture's classifier reads its score at the last token (looked up on the meta device)."""
    with torch.device("meta"):
        return hasattr(AutoModelForSequenceClassification.from_config(config), "score")


def scoring(lm: PreTrainedModel) -> PreTrainedModel:
    """A sequence classifier on the backbone of `lm`, which is shared, with a new score head, w ~ N(0, 1 / (H + 1)).

    Source of the head's scale: that of the value head, `src.models.scalar_head.value_head`.
    """
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    if not hasattr(classifier, "score"):
        raise ModelError(f"{type(lm).__name__}: transformers has no sequence classifier with a score head for it")
    setattr(classifier, classifier.base_model_prefix, lm.base_model)
    hidden = lm.get_output_embeddings().weight.shape[1]
    classifier.score = nn.Linear(hidden, 1, bias=False)
    nn.init.normal_(classifier.score.weight, std=1 / (hidden + 1) ** 0.5)
    classifier.name_or_path = lm.name_or_path
    return classifier.eval()


def build_reward_tokenizer(net_choice: RewardChoice, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer of the chosen reward model."""
    return net_choice.build_tokenizer(corpus)
