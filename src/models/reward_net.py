"""The model of the reward stage: a sequence classifier with one output, trained whole or by a LoRA adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.errors import ModelError
from src.models.adapters import not_adaptable, sort_targets
from src.models.forward import gradient_checkpointing, head_at_end, hidden_states, sequence_scores
from src.models.quantized import merged
from src.models.reward_adapter import AdapterFacts
from src.models.scalar_head import BIAS_KEY, scale_scores, score_bias, shift_scores
from src.models.settings import LoraSettings
from src.models.sharding import plain_head
from src.models.vocab_head import token_logprobs

CHAT_KEY = "reads_chat_template"  # in config.json: texts were formatted with the tokenizer's chat template


class RewardNet(nn.Module):
    """r(x, y) = w . h(last token) + b of a classifier; `lm_head` turns the same hidden states into logits, if given.

    `chat_template`: texts must be formatted with the tokenizer's template. `facts`: the base that an adapter was
    trained on.
    """

    def __init__(
        self,
        classifier: PreTrainedModel | PeftModel,
        *,
        lm_head: nn.Module | None = None,
        chat_template: bool = False,
        facts: AdapterFacts | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.classifier, self.lm_head, self.chat_template, self.facts = classifier, lm_head, chat_template, facts
        self.checkpointing = checkpointing
        self.gain = 1.0  # factor from scores back to the scale of the training loss
        self.bias = score_bias(self.model)  # b, which `save` writes where plain transformers finds it, if possible
        setattr(self.model.config, BIAS_KEY, 0.0)

    @property
    def model(self) -> PreTrainedModel:
        """The classifier of transformers, with its adapters."""
        return self.classifier.get_base_model() if isinstance(self.classifier, PeftModel) else self.classifier

    def scores(self, ids: Tensor, mask: Tensor) -> Tensor:
        """r, read at the last counted token. Shapes: (B, S) -> (B,)."""
        with gradient_checkpointing(self.model, self.checkpointing and torch.is_grad_enabled()):
            return sequence_scores(self.model, ids, mask) + self.bias

    def scores_and_logprobs(self, ids: Tensor, mask: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        """r (B,), and log p(token) (N,) nats of the tokens in `response_mask` that have one before them.

        Shapes: ids and mask (B, S); response_mask (C, S), for the first C <= B rows only. One forward pass.
        """
        assert self.lm_head is not None  # `src.stages.checks` refuses lm_coef without one
        with gradient_checkpointing(self.model, self.checkpointing and torch.is_grad_enabled()):
            hidden = hidden_states(self.model, ids, mask)
        rows = len(response_mask)
        predicts = mask[:rows, :-1] & response_mask[:, 1:]
        logprobs, _ = token_logprobs(plain_head(self.lm_head), hidden[:rows, :-1][predicts], ids[:rows, 1:][predicts])
        return head_at_end(self.model.score, hidden, mask) + self.bias, logprobs

    def normalize(self, mean: float, std: float) -> None:
        """Replace the score r by (r - mean) / std. Raises `ModelError` when scores do not vary."""
        if not std > 0:
            raise ModelError("the reward model gives every sample the same score: it has learned nothing")
        scale_scores(self.model, 1 / std)
        self.gain *= std
        self.bias = (self.bias - mean) / std

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Write `model/`, which `AutoModelForSequenceClassification` loads; for an adapter also `adapter/`.

        That is a folder of peft (task SEQ_CLS: adapter and score head) with the facts in `reward.json`.
        """
        if isinstance(self.classifier, PeftModel):
            self.classifier.save_pretrained(str(folder / "adapter"))
            tokenizer.save_pretrained(folder / "adapter")
            sort_targets(folder / "adapter")
            if self.facts is not None:
                self.facts.write(folder / "adapter", self.bias)
        model = copy.deepcopy(self.classifier)  # one rank saves; all continue with the same weights
        model = merged(model) if isinstance(model, PeftModel) else model
        shift_scores(model, self.bias)
        # transformers reads the last token that is not padding: the end token must not be the padding token
        ends = tokenizer.pad_token_id == tokenizer.eos_token_id
        model.config.pad_token_id = None if ends else tokenizer.pad_token_id
        setattr(model.config, CHAT_KEY, self.chat_template)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return folder / "model"


def adapted(classifier: PreTrainedModel, lora: LoraSettings) -> PeftModel:
    """Freeze a classifier and add a new adapter to its backbone; the layers after the backbone are trained whole.

    Raises `ModelError` when a target matches no layer.
    """
    classifier.requires_grad_(False)
    heads = [
        name
        for name, module in classifier.named_children()
        if name != classifier.base_model_prefix and any(True for _ in module.parameters())
    ]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        exclude_modules=[*heads, *(not_adaptable(classifier) if lora.targets == "all-linear" else ())],
        modules_to_save=heads,
        task_type="SEQ_CLS",
    )
    try:
        return get_peft_model(classifier, config)
    except ValueError as error:
        where = f"reward_model.net.lora.targets={lora.targets!r}"
        raise ModelError(f"{where} does not fit {classifier.name_or_path!r}: {error}") from error
