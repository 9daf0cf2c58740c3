"""docs/conformance.md: how implementations decide where PPO leaves a choice, and what each choice changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.conformance import example

SOURCES = {  # letter -> project, repository, commit, files
    "T": ("TRL", "huggingface/trl", "0062ee10; 2d3eb40f",
        "trl/experimental/ppo/ppo_trainer.py; trl/experimental/ppo/ppo_config.py"),
    "O": (
        "OpenRLHF", "OpenRLHF/OpenRLHF", "89308a0b; 09f5acef; 02a26057",
        "openrlhf/trainer/ppo_utils/experience_maker.py; openrlhf/models/loss.py; openrlhf/models/utils.py",
    ),
    "V": (
        "verl", "volcengine/verl", "012be9d9; 03c8cca1; 00401103; 0081137b; 0df61dc5",
        "verl/trainer/ppo/core_algos.py; verl/utils/torch_functional.py; verl/trainer/ppo/ray_trainer.py; "
        "verl/workers/actor/dp_actor.py; verl/workers/reward_manager/naive.py",
    ),
    "U": (
        "torchtune", "pytorch/torchtune", "26ffccfb; 000bb70f; 010eab0d",
        "torchtune/rlhf/rewards.py; torchtune/rlhf/loss/ppo.py; recipes/ppo_full_finetune_single_device.py",
    ),
    "N": (
        "NeMo-RL", "NVIDIA-NeMo/RL", "00925dd1; 00690790; 00439539",
        "nemo_rl/algorithms/advantage_estimator.py; nemo_rl/algorithms/loss/loss_functions.py; "
        "nemo_rl/algorithms/utils.py",
    ),
    "X": (
        "trlX", "CarperAI/trlx", "0021f2f9; 03bb2d5f; 13a01fc6",
        "trlx/models/modeling_ppo.py; trlx/trainer/accelerate_ppo_trainer.py and trlx/utils/modeling.py; "
        "trlx/data/default_configs.py",
    ),
    "M": (
        "MiniMind", "jingyaogong/minimind", "00da9595; 101d7df2", "trainer/train_ppo.py; trainer/rollout_engine.py"
    ),
    "P": (
        "PaLM-rlhf-pytorch", "lucidrains/PaLM-rlhf-pytorch", "00c118d2; 03704500",
        "palm_rlhf_pytorch/ppo.py; palm_rlhf_pytorch/palm.py",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One decision: who decides how (letters of `SOURCES`), what it changes in the example, and the option here."""

    title: str
    choices: dict[str, str]
    effect: Callable[[], str]
    here: str


QUESTIONS = (
    Question(
        "where the score lands",
        {"at the last token": "O V N X M", "one slot after it, where there is room": "T U", "no token rewards": "P"},
        example.place,
        "at the last token",
    ),
    Question(
        "a response that was cut off",
        {
            "a penalty is subtracted, off by default": "T",
            "the score is set to a constant": "U",
            "an end token is appended before scoring": "X",
            "its score stays": "V M P",
        },
        example.cut_off,
        "`missing_eos=set`, `subtract`, `none`",
    ),
    Question(
        "where the KL to the reference is",
        {
            "in the reward": "T U X",
            "in the reward or the loss": "O V N",
            "in the loss": "M",
            "nowhere; a KL to the policy before the update is subtracted": "P",
        },
        example.kl_place,
        "`kl=reward`, `loss`, `both`, `none`; [objectives.md](objectives.md) has what each optimizes",
    ),
    Question(
        "its estimate",
        {"k1": "U X", "k1 or k3": "T", "k1, k2 or k3": "O", "k1, k2, k3 or abs(log-ratio)": "V",
         "k3 unless k1 or k2 is chosen": "N", "k3": "M"},
        example.estimators,
        "`kl_estimator=k1`, `k2`, `k3`, `exact`; k2, k3 and exact are refused in the reward alone",
    ),
    Question(
        "bounds of that estimate",
        {"k3 within -10 to 10, log-ratio within -20 to 20": "V", "every estimate within the same bounds": "N",
         "none": "T O U X M"},
        example.clamp,
        "none",
    ),
    Question(
        "whitening's variance",
        {"divided by n - 1": "T V U", "divided by n": "O M P", "n - 1 in one process, n in several": "X",
         "n for REINFORCE++": "N"},
        example.divisor,
        "n - 1, in any number of processes",
    ),
    Question(
        "whitening's mean",
        {"removed": "T O V N X M P", "added again": "U"},
        example.mean_kept,
        "removed from advantages; kept by `ppo.whiten_rewards`",
    ),
    Question(
        "padding in whitening",
        {"left out": "T O V N U M", "counted": "X"},
        example.padding,
        "left out",
    ),
    Question(
        "what is whitened together",
        {"all responses of the iteration": "O V N U", "those of the process": "T M", "each minibatch": "P"},
        example.scope,
        "all of the iteration, over all processes",
    ),
    Question(
        "temperature in log-probabilities",
        {"that of sampling": "T O V U", "1, whatever sampling has": "X P", "1, with sampling at 0.8": "M"},
        example.temperature,
        "that of sampling; another is refused",
    ),
    Question(
        "a filter of the sampler",
        {"none by default": "T X", "a top-k filter by default, which the log-probabilities leave out": "P"},
        example.filtered,
        "there is none",
    ),
    Question(
        "clip of the ratio",
        {"0.2": "T X P", "0.2 below and above, each its own": "O N", "its own below and above": "V",
         "0.1 unless configured": "U", "configured": "M"},
        example.policy_clip,
        "`policy_loss=clip`, `ppo.clip`, `ppo.clip_low`, `ppo.clip_high`",
    ),
    Question(
        "a second bound for bad actions",
        {"always, 3 by default": "V", "off by default": "N", "none": "T O U X M P"},
        example.dual_clip,
        "`policy_loss=dual_clip`, `ppo.dual_clip`",
    ),
    Question(
        "clip of the value",
        {"0.2": "T U X", "configured": "V M", "off unless configured": "O N", "0.4": "P"},
        example.value_clip,
        "`value_loss=clipped`, `ppo.value_clip`; `value_loss=mse`",
    ),
    Question(
        "factor 0.5 of the value loss",
        {"yes": "T O V U N X M", "no": "P"},
        example.half,
        "yes",
    ),
    Question(
        "mean of the loss",
        {"over tokens": "T U X M", "over tokens or responses": "O N", "over tokens, responses or a constant": "V"},
        example.aggregation,
        "`aggregation=token_mean`, `sequence_mean`, `constant_length`",
    ),
    Question(
        "micro-batches",
        {"the mean of their means": "T U M", "weighted by the tokens of the whole batch": "N"},
        example.micro,
        "weighted by the whole minibatch, so that their size changes nothing",
    ),
    Question(
        "what steers an adaptive KL coefficient",
        {"fixed only": "T U M", "the mean per token": "V", "k3 summed over prompt and response, after each step": "X"},
        example.controller,
        "`kl_controller=adaptive`: the estimate summed over a response, once an iteration",
    ),
    Question(
        "deviation of a group (GRPO)",
        {"of the group, + 1e-9; a choice": "O", "of the group, + 1e-6; a choice": "V",
         "of the other samples, + 1e-6; a choice": "N"},
        example.group_scale,
        "`advantage=group_relative`, of the group, + 1e-6; `ppo.group_scale=false` without",
    ),
    Question(
        "range of the scores",
        {"clipped at 10, scaling off by default": "X", "a range, off by default": "O", "as they are": "T V U M P"},
        example.score_clip,
        "`ppo.score_clip`; `score_scaling=scale`, `normalize`",
    ),
)  # fmt: skip

TEXT = """# Where implementations of PPO differ

Written by `python -m tests.conformance`; a test compares this page with what the code computes.

PPO for language models leaves about twenty decisions to whoever writes it. This page lists them: how six libraries and
two popular teaching implementations decide, what each choice changes in one worked example, and which option here gives
which. The facts were read in the files named at the end, at those commits; later versions may differ, and a letter is
missing where a project was not read on that point. MiniMind samples at temperature 0.8 and scores the tokens at 1;
PaLM-rlhf-pytorch does the same with any temperature and with its filter. The ratio of the first step is 1 all the same,
so nothing fails: the policy that is improved is another one than the policy that was sampled.

**The example.** Two responses, of three tokens and of two; the second was cut off. Scores 1 and -0.5; values 0.1, 0.3,
0.6 and 0, -0.2; log-probabilities -1, -0.5, -0.2 and -2, -0.7, of the reference -1.2, -0.4, -0.5 and -2.1, -1.1. The
coefficient of the KL is 0.1, gamma 1, lambda 0.95.

"""


def page() -> str:
    """The whole page."""
    lines = ["| | who decides how | in the example | here |", "|---|---|---|---|"]
    for number, question in enumerate(QUESTIONS, start=1):
        who = "; ".join(f"{choice}: **{' '.join(names.split())}**" for choice, names in question.choices.items())
        lines.append(f"| {number}. {question.title} | {who} | {question.effect()} | {question.here} |")
    lines += ["", "## Sources", "", "| | project | repository | files, each at its commit |", "|---|---|---|---|"]
    for letter, (project, repository, commits, files) in SOURCES.items():
        parts = files.split("; ")
        at = commits.split("; ")
        listed = "; ".join(f"{file} ({commit})" for file, commit in zip(parts, at, strict=True))
        lines.append(f"| **{letter}** | {project} | {repository} | {listed} |")
    return TEXT + "\n".join(lines) + "\n"
