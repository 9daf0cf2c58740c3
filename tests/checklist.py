"""What a correct PPO for language models must get right, and the tests that show it here.

    python -m tests.checklist        writes docs/checklist.md

A test names the items it shows in its docstring ("Checklist 5, 6, 58."); this file only collects them.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "checklist.md"

ITEMS = {
    1: "the logprob of response token t is read from the logits at t - 1",
    2: "left padding changes no logprob: positions count real tokens",
    3: "the size of a forward batch changes no logprob",
    4: "a learning rate of 0 leaves every ratio at 1 and every KL(old || new) at 0, in all epochs",
    5: "in the first minibatch every ratio is 1 and nothing is clipped",
    6: "every dropout is off, in rollout and in update",
    7: "the stop token counts, nothing after it does",
    8: "a response without a stop token counts whole, its padding does not",
    9: "padding is known by position, so pad = eos masks no real stop token",
    10: "a response ends at its first stop token, whichever of several it is",
    11: "what stands in the padding changes nothing",
    12: "an empty response or batch is finite and adds 0",
    13: "NaN outside the mask stays there",
    14: "one temperature for sampling, logprobs of all roles and the loss",
    15: "what is sampled is what is scored: no top-k, no top-p, no repetition penalty",
    16: "the score falls on the last counted token, once",
    17: "... also when the response fills the row",
    18: "the KL term falls on every response token, and on no prompt token",
    19: "an unfinished response: its score is replaced, or lowered, by rules of different names",
    20: "scale, clip, missing-EOS rule, KL: in this order",
    21: "running moments equal those of all scores at once, unbiased",
    22: "scaling divides by the standard deviation and leaves the mean",
    23: "whitened rewards keep their mean",
    24: "the reward model reads text with its own tokenizer, and its scores on SFT samples have mean 0, variance 1",
    25: "a reward model without a trained head is refused, never given a fresh one",
    26: "the pairwise loss is finite at any difference",
    27: "... and blind to padding, antisymmetric in the pair",
    28: "k1, k2, k3 by their closed forms; E[k1] = E[k3] = KL",
    29: "as a loss k1 has no expected gradient, k2 that of the KL, k3 that of the reverse KL",
    30: "the KL that is logged is the KL that is trained on",
    31: "without weight on the KL the reference is not asked",
    32: "the adaptive coefficient: its formula, its bounds, its place in the checkpoint",
    33: "KL(policy || reference) starts at exactly 0, also when SFT was an adapter",
    34: "lambda = 1, gamma = 1, V = 0: reward-to-go; lambda = 0: TD error; returns = A + V before whitening",
    35: "nothing is bootstrapped after the end",
    36: "right padding changes no advantage",
    37: "a gap inside a response is skipped: as if the tokens stood side by side",
    38: "whitened advantages have mean 0, standard deviation 1",
    39: "whitening: unbiased variance, the constant inside the root",
    40: "whitening is over all ranks",
    41: "a single token whitens to 0, not to NaN",
    42: "whitening happens once per iteration; targets carry no gradient",
    43: "the clipped loss in all cases of sign and side; gradient 0 where clipped",
    44: "the second clip acts for negative advantages only",
    45: "the value loss is clipped around the old values; without clip it is 0.5 (V - R)^2",
    46: "the clamp of the log-ratio touches no sane number; the reported KL is not clamped",
    47: "micro-batches change neither loss nor gradient",
    48: "ranks change neither loss nor gradient",
    49: "policy and critic have optimizers of their own; no weight is shared, so no coefficient joins the losses",
    50: "the gradient norm is clipped once per step and logged",
    51: "Adam's epsilon is 1e-5; the learning rate falls to 0 over the iterations",
    52: "each epoch is a fresh permutation in which every sample comes once",
    53: "the entropy is exact, and masked",
    54: "explained variance is 1 - Var(R - V) / Var(R)",
    55: "a stop on KL(old || new) skips the update, not the log",
    56: "the language-model loss is masked and has its own weight",
    57: "the penalty form weighs KL(old || new); doubled above 1.5 targets, halved below the target / 1.5",
    58: "bf16: log-softmax in float32; old logprobs come from the training path",
    59: "frozen roles: no gradient, no optimizer state, eval mode throughout",
    60: "critic warm-up leaves the policy bit-identical; no gradient crosses adapters",
    61: "killed and resumed equals uninterrupted",
    62: "a resume at the end of an epoch goes on",
    63: "other data on resume starts at its beginning",
    64: "iterations are counted as documented, though two optimizers step",
    65: "the exported policy gives the policy's logits and holds no value head",
}
INTRO = """\
# Checklist

What a correct PPO for language models must get right, and the tests, below `tests/`, that show it here. Written by
`python -m tests.checklist`.
"""
CHOICES = """\
## Where others decide differently

- **Position of the score** (16): on the last counted token, the stop token where there is one, as in OpenRLHF, verl and
  NeMo. TRL and torchtune put it one slot later, with a value for that slot; the extra slot is no action, so nothing
  the policy did is credited there.
- **Gaps inside a response** (37): a token that does not count (tool output) is skipped: no discount for it, its value
  is not read. verl and NeMo-RL do the same; OpenRLHF and NeMo-Aligner discount through the gap.
- **Whitening** (38, 39): over all tokens of an iteration, variance with n - 1, `1e-8` inside the root, as TRL and verl;
  OpenRLHF divides by n and clamps. Both agree to rounding beyond a few dozen tokens.
- **A group of one** (`rloo`, `group_relative`): has nothing to be compared with and contributes 0; some give it its
  whole score as advantage, which turns a dropped sample into a large, biased gradient.
- **End of a cut-off response** (35): V = 0 after it, as after a stop token, as the classical code does.
"""


def shown_by() -> dict[int, list[str]]:
    """Item -> the tests whose docstrings name it, as file::test."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in numbers(ast.get_docstring(node) or ""):
                    found[number].append(f"{path.relative_to(ROOT / 'tests')}::{node.name}")
    return found


def numbers(docstring: str) -> set[int]:
    """The items that a docstring names: "Checklist 1, 2 and Checklist 14"."""
    lists = re.findall(r"Checklist (\d+(?:(?:, | and |, Checklist | and Checklist )\d+)*)", docstring)
    return {int(number) for part in lists for number in re.findall(r"\d+", part)}


def page() -> str:
    """The text of docs/checklist.md."""
    found = shown_by()
    rows = [
        f"| {number} | {text} | {'<br>'.join(f'`{test}`' for test in found.get(number, [])) or 'not built yet'} |"
        for number, text in ITEMS.items()
    ]
    return "\n".join([INTRO, "| | what | tests |", "|---|---|---|", *rows]) + f"\n\n{CHOICES}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {sum(1 for number in ITEMS if shown_by().get(number))} of {len(ITEMS)} items have a test")
