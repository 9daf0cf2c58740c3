"""Make models, tokenizer and prompts of the comparison: `python -m benchmarks.compare.files FOLDER`.

No response ends early in either program: coordinate 0 of the last hidden state is always 1, and the special tokens
(padding, end, unknown, the first word of a prompt) have -100 there in the tied embedding, so that their probability is
below exp(-90).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerBase

from benchmarks.compare.workload import VOCABULARY, Workload
from src.data.tokenizers import word_level
from src.models.reward_choices import SharedBaseAdapter
from src.models.settings import LoraSettings, ModelSettings

BEGIN = "begin"
SPECIAL = 3  # special tokens of a word-level tokenizer: padding, end, unknown


def make_tokenizer() -> PreTrainedTokenizerBase:
    """As many words as GPT-2 has tokens, so that decoded text is tokenized to the same tokens again."""
    return word_level([" ".join([BEGIN, *(f"w{i}" for i in range(VOCABULARY - SPECIAL - 1))])])


def write_models(workload: Workload, folder: Path) -> None:
    """Write `policy`, and `reward` of the same shape, with random weights."""
    tokenizer = make_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {
        "n_layer": workload.layers,
        "n_head": workload.heads,
        "n_embd": workload.width,
        "vocab_size": len(tokenizer),
    }
    torch.manual_seed(0)
    torch.set_default_device(workload.device)
    torch.set_default_dtype(torch.bfloat16 if workload.device == "cuda" else torch.float32)
    policy = GPT2LMHeadModel(GPT2Config(**shape, **ids, **dropout))
    final, embedding = policy.transformer.ln_f, policy.get_input_embeddings().weight
    with torch.no_grad():
        final.weight[0], final.bias[0] = 0.0, 1.0
        embedding[[*range(SPECIAL), tokenizer.convert_tokens_to_ids(BEGIN)], 0] = -100.0
    reward = GPT2ForSequenceClassification(GPT2Config(**shape, **ids, **dropout, num_labels=1))
    for name, model in {"policy": policy, "reward": reward}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)


def write_reward_adapter(workload: Workload, folder: Path) -> None:
    """Write `reward_adapter`: a new LoRA adapter and score head on the policy's base."""
    lora = LoraSettings(workload.rank, 2 * workload.rank, 0.0, ["c_attn"])
    settings = ModelSettings("policy", str(folder / "policy"), "float32", "sdpa", False, lora, None)
    net = SharedBaseAdapter(settings, lora).build(make_tokenizer(), 0, False)
    net.save(folder / "reward_adapter", make_tokenizer())


def write_prompts(workload: Workload, folder: Path) -> None:
    """Write prompts of the workload's lengths; one for each of the other splits, which are not measured."""
    draws = torch.Generator().manual_seed(1)

    def prompt(tokens: int) -> str:
        words = torch.randint(VOCABULARY - SPECIAL - 1, (tokens - 1,), generator=draws).tolist()
        return " ".join([BEGIN, *(f"w{i}" for i in words)])

    for split, lengths in {"train": workload.prompt_lengths, "validation": [16], "test": [16]}.items():
        rows = [json.dumps({"prompt": prompt(length)}) + "\n" for length in lengths]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")


def main() -> None:
    """Entry of the command line."""
    folder = Path(sys.argv[1])
    workload = Workload.read(folder)
    write_models(workload, folder)
    write_reward_adapter(workload, folder)
    write_prompts(workload, folder)


if __name__ == "__main__":
    main()
