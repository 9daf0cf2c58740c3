"""One process of TRL's PPO, run by a Python with TRL: `python -m benchmarks.compare.by_trl FOLDER [WORD ...]`.

The words `policy` and `critic` give each a LoRA adapter, `bfloat16` the precision of weights and products.
TRL's own trainer runs. Phases are separated from outside: sampling ends when `batch_generation` returns, scoring when
`forward` is first called with gradients.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.compare.workload import Clock, Workload


class PhaseClock(TrainerCallback):
    """Times the phases and counts the tokens of the responses."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, device: str) -> None:
        self.device = device
        self.specials = torch.tensor(tokenizer.all_special_ids)
        self.tokens, self.scoring = 0, False
        self.generation, self.forward = ppo_trainer.batch_generation, ppo_trainer.forward
        ppo_trainer.batch_generation, ppo_trainer.forward = self._generate, self._forward
        register_optimizer_step_post_hook(self._count)

    def _generate(self, model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        answer = self.generation(model, queries, *rest)
        self.clock.lap("rollout")
        self.scoring = True
        self.tokens = int((~torch.isin(answer[0][:, queries.shape[1] :], self.specials)).sum())
        return answer

    def _forward(self, *arguments: Any) -> Any:
        if self.scoring and torch.is_grad_enabled():
            self.clock.lap("score")
            self.scoring = False
        return self.forward(*arguments)

    def _count(self, *_: Any) -> None:
        self.clock.steps += 1

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.clock = Clock(self.device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End an iteration."""
        self.clock.lap("train")
        self.clock.finish(self.tokens)


def settings(workload: Workload, folder: Path, half: bool) -> PPOConfig:
    """The workload as TRL's settings; accumulation over 1 gives one optimizer step per minibatch."""
    return PPOConfig(
        output_dir=str(folder / "trl"), use_cpu=workload.device == "cpu", bf16=half,
        gradient_checkpointing=False, report_to=[],
        save_strategy="no", disable_tqdm=True, num_sample_generations=0, learning_rate=1e-5,
        per_device_train_batch_size=workload.rows, gradient_accumulation_steps=1,
        num_mini_batches=workload.rows // workload.minibatch, num_ppo_epochs=workload.epochs,
        total_episodes=workload.rows * workload.iterations, local_rollout_forward_batch_size=workload.rows,
        response_length=workload.new_tokens, stop_token=None, temperature=1.0, missing_eos_penalty=None,
    )  # fmt: skip


def main() -> None:
    """Entry of the command line."""
    torch.set_num_threads(1)
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    workload, half = Workload.read(folder), "bfloat16" in words
    dtype = torch.bfloat16 if half else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    assert [len(prompt) for prompt in prompts] == workload.prompt_lengths

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, dtype=dtype)

    def adapter(kind: str) -> LoraConfig:
        return LoraConfig(
            r=workload.rank, lora_alpha=2 * workload.rank, lora_dropout=0.0, target_modules=["c_attn"], task_type=kind,
            modules_to_save=["score"] if kind == "SEQ_CLS" else None,
        )  # fmt: skip

    PPOTrainer(
        args=settings(workload, folder, half),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype),
        ref_model=None,
        reward_model=classifier(),
        value_model=get_peft_model(classifier(), adapter("SEQ_CLS")) if "critic" in words else classifier(),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        peft_config=adapter("CAUSAL_LM") if "policy" in words else None,
        callbacks=[PhaseClock(tokenizer, workload.device)],
    ).train()


if __name__ == "__main__":
    main()
