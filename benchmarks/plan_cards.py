"""Seconds of a PPO iteration on 1, 8 and 64 cards at 1B, 8B and 70B, predicted: `python -m benchmarks.plan_cards`.

Nothing is measured. Published figures of a card, and the shares of them in `src/plan/machine.py`; the shapes are those
of public models' config.json. Writes benchmarks/results/plan_cards.md.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig

from src.models.settings import LoraSettings
from src.plan.devices import GB, RESERVE
from src.plan.iteration import OPTIMIZER, ROLLOUT, SCORING, SYNCHRONIZATION, TRAINING, Ranks, Roles, Sizes, iteration
from src.plan.machine import CARDS, card
from src.plan.read import shape_of
from src.plan.report import forecast, strategy

PAGE = Path(__file__).parent / "results" / "plan_cards.md"
CARD, SEVERAL_MACHINES = "H100", 50.0  # GB/s that a card sends to another machine: 400 Gbit/s each
SHAPES = {
    "1B": LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                      num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "8B": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False),
    "70B": LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                       num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False),
}  # fmt: skip
SIZES = Sizes(rows=512, samples=1, prompt=256, response=512, epochs=2, minibatch=128, micro=8, scoring=32)
PHASES = (ROLLOUT, SCORING, TRAINING, OPTIMIZER, SYNCHRONIZATION)
HEAD = f"""# Predictions for {CARD} cards

**Predicted, not measured.** Published figures of the card: {CARDS[CARD].flops / 1e12:.0f} TFLOP/s in bfloat16,
{CARDS[CARD].bandwidth / 1e12:.2f} TB/s, {CARDS[CARD].memory / GB:.0f} GB. The shares of them that are achieved stand in
`src/plan/machine.py`: measured where [gpu.md](gpu.md) has a figure, assumed where not (40 % of the products' peak).
{SIZES.rows} prompts of {SIZES.prompt} tokens, responses of {SIZES.response}, {SIZES.epochs} epochs in minibatches of
{SIZES.minibatch}, micro-batches of {SIZES.micro} with gradient checkpointing; LoRA of rank 16 on every linear layer of
policy and critic, a reward without weights. Machines of 8 cards, {SEVERAL_MACHINES:.0f} GB/s per card between them.
Sampling reads one whole model on each card, also under `trainer=fsdp`: where its weights alone exceed
{RESERVE:.0%} of a card the row says so, and its seconds would be those of a larger card.

| model | cards | strategy | weights of the base (GB) | seconds | {" / ".join(PHASES)} |
|---|---|---|---|---|---|
"""


def row(name: str, cards: int) -> str:
    """The prediction for so many cards: whole models on each where they fit, else shards."""
    shape = shape_of(SHAPES[name], "bfloat16", LoraSettings())
    heads = 1 if SHAPES[name].tie_word_embeddings else 2
    base = shape.size * (shape.layers * shape.of_layer + heads * shape.of_head)
    adapters = 4 * shape.layers * shape.of_adapters
    roles = Roles(
        policy=shape, base=base, gradients={"policy": adapters, "critic": adapters}, rewards=[],
        policy_layers=shape.layers, critic_layers=shape.layers, reference=True, checkpointing=True,
    )  # fmt: skip
    fits = base <= RESERVE * CARDS[CARD].memory
    ranks, machine = Ranks(cards, sharded=not fits and cards > 1), card(CARD)
    machine = machine if cards <= 8 else machine.linked(SEVERAL_MACHINES)
    found = forecast(machine, iteration(roles, SIZES, ranks), "bfloat16")
    parts = " / ".join(f"{found.of(phase):.3g}" for phase in PHASES)
    weights = f"{base / GB:.0f}{'' if fits else ', **does not fit**'}"
    return f"| {name} | {cards} | {strategy(ranks).partition(',')[0]} | {weights} | {found.total:.3g} | {parts} |"


if __name__ == "__main__":
    rows = [row(name, cards) for name in SHAPES for cards in (1, 8, 64)]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
