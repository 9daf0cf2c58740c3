"""Bad input of every kind: what was given, the one answer to it, the exit code, and what is kept."""

# ruff: noqa: E501, whole sentences stay on their line

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from src.checkpointing.checkpoint import checkpoints
from src.checkpointing.checksum import checksum_matches, seal
from tests.errors.workshop import Place, mounted

Make = Callable[[Place], Any]
TINY = (
    "experiment=none model=gpt2 model.path={lm} reward=vader trainer.accelerator=cpu model.lora.rank=2 ppo.num_iterations=2 "
    "ppo.batch_size=8 ppo.minibatch_size=8 ppo.micro_batch_size=8 ppo.epochs=1 ppo.eval_prompts=4 rollout.scoring_batch_size=4 "
    "rollout.max_prompt_tokens=8 rollout.max_new_tokens=6 callbacks.checkpoint.every=1 log_dir={tmp}/logs"
)
RESUMED = (  # the command that made the shared run
    "experiment=quick model=gpt2 reward=vader trainer.accelerator=cpu model.lora.rank=2 ppo.num_iterations=2 ppo.batch_size=8 "
    "ppo.minibatch_size=8 ppo.epochs=1 ppo.lr=0.05 ppo.eval_prompts=6 rollout.scoring_batch_size=4 rollout.max_prompt_tokens=8 "
    "rollout.max_new_tokens=6 rollout.temperature=0.9 data.n_pairs=10 callbacks.checkpoint.every=1 name=tiny log_dir={tmp}/logs"
)
REVIEWS = "data.n_reviews=240 data.n_pairs=10"  # of the embedded corpus
OWN = "data=custom data.columns.prompt=q data.path={tmp}/rows.jsonl"
RATED = "data=movie_reviews data.path={tmp}/rows.jsonl"
NOTHING = "nothing was begun"  # there is no run folder
FOLDER = "the run's folder"


@dataclass(frozen=True)
class Case:
    """A row of the table. `…` in an answer stands for what a library says; {tmp}, {lm}, {run} for folders.

    `command` is the module of `src` and what follows it; `base` is what the page leaves out. With exit code 0 the answer is
    part of what is printed, and `kept` says what came of the input.
    """

    given: str
    command: str
    answer: str
    code: int = 2
    kept: str = NOTHING
    make: Make | None = None
    base: str = TINY
    check: Make | None = None  # that what is kept is there
    within: Callable[[Place], AbstractContextManager[None]] | None = None  # what holds while the command runs


def rows(*texts: str) -> list[dict[str, str]]:
    """Twelve plain prompts and these."""
    return [*({"q": f"the film {i}"} for i in range(12)), *({"q": text} for text in texts)]


def bytes_of(content: bytes) -> Make:
    """A rows.jsonl of these bytes."""
    return lambda p: p.write("rows.jsonl", content)


def own(*given: str) -> Make:
    """A rows.jsonl of twelve prompts and these."""
    return lambda p: p.rows("rows.jsonl", rows(*given))


CONFIG = [
    Case("a key with a typing error", "train ppo.clipp=0.1", "ppo.clipp=0.1: there is no key ppo.clipp; close to it: ppo.clip, ppo.clip_low"),
    Case("an option that does not exist", "train policy_loss=nope", "policy_loss=nope: there is no such option; the options are cispo, clip, dual_clip, gspo, kl_penalty, reinforce, trpo"),
    Case("an option with a typing error", "train policy_loss=dualclip", "policy_loss=dualclip: there is no such option; close to it: dual_clip, clip; the options are cispo, clip, dual_clip, gspo, kl_penalty, reinforce, trpo"),
    Case("null for a group", "train trainer=null", "trainer=null: there is no such option; the options are ddp, default, fsdp"),
    Case("a key without a value", "train ppo.clip", "ppo.clip: write ppo.clip=VALUE"),
    Case("a key and its value as two words", "train ppo.clip 0.1", "ppo.clip 0.1: write ppo.clip=0.1"),
    Case("a value without a key", "train =3", "'=3' cannot be read as key=value; a value with = , : or spaces needs quotes in quotes: \"key='a=b'\""),
    Case("an override that is not valid UTF-8", "train name=\udcff", "b'name=\\xff' is not valid UTF-8"),
    Case("a number out of its range", "train ppo.clip=1.5", "ppo.clip=1.5: must be less than 1"),
    Case("infinity", "train ppo.lr=inf", "ppo.lr=inf: must be a finite number"),
    Case("no number at all", "train rollout.temperature=nan", "rollout.temperature=nan: must be a finite number"),
    Case("a number that fits nowhere", "train ppo.num_iterations=99999999999999999999", "ppo.num_iterations=99999999999999999999: must be at most 9223372036854775807"),
    Case("a word for a number", "train ppo.epochs=many", "ppo.epochs='many': must be a whole number"),
    Case("a fraction for a whole number", "train ppo.epochs=1.5", "ppo.epochs=1.5: must be a whole number"),
    Case("null where a number is needed", "train ppo.clip=null", "ppo.clip=null: must be a number"),
    Case("a number for a path", "train model.path=5", "model.path=5: must be a text, or null"),
    Case("a number for a group of keys", "train model.lora=5", "model.lora=5: must be a group of keys, or null"),
    Case("a list of numbers for names of layers", "train model.lora.targets=[1,2]", "model.lora.targets=[1, 2]: must be a text or a list in which each is a text"),
    Case("a reference that leads nowhere", "train ppo.clip=${nope}", "ppo.clip: Interpolation key 'nope' not found"),
    Case("a value that must be given", "train reward=keyword", "reward.keywords must be given with these choices: add reward.keywords=..."),
    Case("a key of another option", "train policy_loss=reinforce ppo.clip=0.2", "ppo.clip=0.2: nothing reads ppo.clip here, it belongs to policy_loss=clip or policy_loss=dual_clip"),
    Case("a key that people know from elsewhere", "train ppo.learning_rate=1e-5", "ppo.learning_rate=1e-5: there is no key ppo.learning_rate; use ppo.lr"),
    Case("a sampling that is not done here", "train rollout.top_p=0.9", "rollout.top_p=0.9: is not supported; tokens are drawn from the whole distribution, whose log-probabilities are trained; rollout.temperature shapes it"),
    Case("a key that is added where none can be", "train +ppo.weight_decay=0.1", "+ppo.weight_decay=0.1: there is no key ppo.weight_decay; close to it: reward_model.weight_decay, sft.weight_decay; + and ~ add and remove keys of trainer, callbacks, logger, hydra, reward.parts, reward.weights, gold_reward.parts, gold_reward.weights, reward.step, rollout.engine.options alone"),
    Case("a key to be removed that is not there", "train ~callbacks.rollout", "~callbacks.rollout: there is no key callbacks.rollout to remove"),
    Case("a key to be removed that every run reads", "train ~callbacks.checkpoint", "~callbacks.checkpoint: every run reads callbacks.checkpoint, so it cannot be removed"),
    Case("an argument of the Trainer that means something else here", "train +trainer.max_steps=1", "+trainer.max_steps=1: is not supported; the length of a stage is ppo.num_iterations, sft.steps or reward_model.steps"),
    Case("an argument that the Trainer does not have", "train +trainer.nonsense=1", "trainer.nonsense: Lightning's Trainer has no such argument"),
    Case("a group that another option brings along", "train advantage=rloo value_loss=mse", "value_loss=mse: value_loss is part of advantage=baseline_value or gae or td alone: choose one of these, or leave value_loss out"),
    Case("several values without a sweep", "train ppo.clip=0.1,0.2", "ppo.clip=0.1,0.2: only a sweep (-m) reads it; a value with = , : or spaces needs quotes in quotes: \"key='a=b'\""),
    Case("a preset in a stage that reads none", "train stage=sft preset=trlx", "preset=trlx: stage=sft does not read preset, only stage=ppo does", base=""),
    Case("choices that exclude each other", "train advantage=rloo", "advantage=rloo compares samples of one prompt: add rollout.samples_per_prompt=4 (at least 2, and a divisor of ppo.batch_size)"),
    Case("one weight for each token, where the loss has one ratio for a response", "train policy_loss=gspo correction=truncate", "correction_level=token: policy_loss=gspo has one ratio for a whole response; use correction_level=sequence"),
    Case("an early stop that keeps another policy than the one it measured", "train rollout.lag=1 early_stop=gold", "rollout.lag=1: early_stop=gold keeps the policy that is updated, not the one before that sampled"),
    Case("more tokens than the model reads", "train rollout.max_new_tokens=60", "rollout.max_prompt_tokens (8) + rollout.max_new_tokens (60) may reach 68 tokens, but model 'gpt2' reads at most 48; give rollout.max_new_tokens=40"),
    Case("the same of a stage that the run needs first", "train experiment=none model=tiny reward=vader", "the SFT stage that this run needs first: sft.max_tokens (512) may reach 512 tokens, but model 'tiny' reads at most 64; train it with `python -m src.train stage=sft … experiment=none model=tiny sft.max_tokens=64`, then give model.path=FOLDER", base="rollout.max_new_tokens=6 log_dir={tmp}/logs", kept="nothing was trained"),
    Case("a layer that is not there", "train model.lora.targets=[nope]", "model.lora.targets=[nope]: no layer of model 'gpt2' is called nope; all-linear adapts every linear layer"),
    Case("processes that do not divide a batch", "train trainer=fsdp trainer.devices=3", "ppo.batch_size=8: counts the rows of all processes together, so it must be a multiple of 3 (trainer.devices); these numbers of processes would do: 1, 2, 4, 8"),
    Case("a loss that shards cannot have", "train trainer=fsdp policy_loss=trpo", "policy_loss=trpo differentiates twice, which trainer=fsdp cannot: use trainer=ddp"),
    Case("an accelerator that does not exist", "train trainer.accelerator=nope", "trainer: You selected an invalid accelerator name: `accelerator='nope'`. …"),
    Case("an accelerator without float64", "train trainer.accelerator=mps", "trainer.accelerator=mps: Apple's GPUs have no float64, in which tokens are drawn; use trainer.accelerator=cpu"),
    Case("a target that runs commands", "train +callbacks.mine._target_=os.system", "callbacks.mine._target_: Target 'os.system' is blocklisted …"),
    Case("a name that leads out of the folder", "train name=../elsewhere", "name='../elsewhere': must be the name of a folder: no slash, no dot in front, at most 100 characters, or null"),
]  # fmt: skip

DATA = [
    Case("a file that is not there", f"train {OWN}", "there is no file {tmp}/rows.jsonl"),
    Case("an empty file", f"train {OWN}", "{tmp}/rows.jsonl is empty, but must have one JSON object per line", make=bytes_of(b"")),
    Case("a line that is cut off", f"train {OWN}", "{tmp}/rows.jsonl:2 is not valid JSON: …", make=bytes_of(b'{"q": "a"}\n{"q": "b\n')),
    Case("invalid UTF-8", f"train {OWN}", "{tmp}/rows.jsonl:2 is not valid UTF-8: byte 8 of the line is 0xff", make=bytes_of(b'{"q": "a"}\n{"q": "\xff"}\n')),
    Case("half of a surrogate pair", f"train {OWN}", "{tmp}/rows.jsonl:2 holds \\ud83c, one half of a surrogate pair, which is no character", make=bytes_of(b'{"q": "a"}\n{"q": "\\ud83c"}\n')),
    Case("lists nested without end", f"train {OWN}", "{tmp}/rows.jsonl:1 is not usable JSON: its lists or objects are nested too deeply", make=bytes_of(b'{"q": ' + b"[" * 100_000)),
    Case("a row that is a list", f"train {OWN}", "{tmp}/rows.jsonl:1 must be a JSON object, but is a list", make=bytes_of(b"[1]\n")),
    Case("a column that is not there", f"train {OWN}", "{tmp}/rows.jsonl:1 has no column 'q', only ['Q']", make=bytes_of(b'{"Q": "a"}\n')),
    Case("a truth value for a prompt", f"train {OWN}", "{tmp}/rows.jsonl:1, column 'q' must be a text or a list of messages, but is True", make=bytes_of(b'{"q": true}\n')),
    Case("a rating that is no number", f"train {RATED}", "{tmp}/rows.jsonl:1, column 'rating' must be a finite number, but is nan", make=bytes_of(b'{"text": "a b c d e f", "rating": NaN}\n')),
    Case("too few rows for three splits", f"train {RATED}", "{tmp}/rows.jsonl leaves the validation and test splits empty: of 1 rows 1 are left after dropping 0 repeated, 0 too long, 0 too short, with 1 prompts", make=bytes_of(b'{"text": "a b c d e f", "rating": 1}\n')),
    Case("one prompt for three splits", f"train {OWN}", "{tmp}/rows.jsonl has too few prompts (1): data.held_out=0.1 holds out at least one for each of validation and test, which leaves none to train on; give more rows, or files in data.splits.validation and data.splits.test", make=bytes_of(b'{"q": "a"}\n')),
    Case("prompts of white space only", f"train {OWN}", "{tmp}/rows.jsonl leaves the train split empty: 0 of 2 rows; dropped: 2 no prompt (first: {tmp}/rows.jsonl:1)", make=bytes_of(b'{"q": " "}\n{"q": ""}\n')),
    Case("a file whose ending says nothing", f"train {OWN} data.path={{tmp}}/rows.tsv", "cannot read {tmp}/rows.tsv: the name of a data file ends with .jsonl, .json, .csv, .parquet", make=lambda p: p.write("rows.tsv", "q\na\n")),
    Case("a file that is no Parquet", f"train {OWN} data.path={{tmp}}/rows.parquet", "cannot read {tmp}/rows.parquet: Parquet magic bytes not found in footer. …", make=lambda p: p.write("rows.parquet", b"nonsense")),
    Case("a table with rows of several lengths", f"train {OWN} data.path={{tmp}}/rows.csv", "{tmp}/rows.csv:3 has 2 cells where the first line has 1", make=lambda p: p.write("rows.csv", "q\na\nb,c\n")),
    Case("a table in another encoding than UTF-8", f"train {OWN} data.path={{tmp}}/rows.csv", "{tmp}/rows.csv:2 is not valid UTF-8: there is a byte 0xba; save it as UTF-8", make=lambda p: p.write("rows.csv", "q\n好\n".encode("gbk"))),
    Case("a table parted by semicolons", f"train {OWN} data.path={{tmp}}/rows.csv", "{tmp}/rows.csv:1 separates the columns by ';': they must be separated by commas", make=lambda p: p.write("rows.csv", "q;a\n1;2\n")),
    Case("a table without rows", f"train {OWN} data.path={{tmp}}/rows.csv", "{tmp}/rows.csv has no rows: it needs a line with the column names and one line per row", make=lambda p: p.write("rows.csv", "q,a\n")),
    Case("a file that the disk does not give", f"train {OWN}", "{tmp}/rows.jsonl cannot be read: …", make=lambda p: (p.tmp / "rows.jsonl").symlink_to("/proc/self/mem")),
    Case("a set of the hub, without a network", "train data=gsm8k", "no usable data set at 'openai/gsm8k' (data.path): it is no local file or folder, …"),
    Case("a template that names no column", f"train {OWN} data.template={{tmp}}/t.jinja", "{tmp}/rows.jsonl:1: data.template cannot be filled: 'z' is undefined; the columns are ['q']", make=lambda p: (own()(p), p.write("t.jinja", "{{ z }}"))),
    Case("a template that divides by zero", f"train {OWN} data.template={{tmp}}/t.jinja", "{tmp}/rows.jsonl:1: data.template cannot be filled: ZeroDivisionError: division by zero; the columns are ['q']", make=lambda p: (own()(p), p.write("t.jinja", "{{ 1 / 0 }}"))),
    Case("a home folder that nobody has", f"train {OWN} \"data.path='~nosuchuser/rows.jsonl'\"", "data.path=~nosuchuser/rows.jsonl: there can be no such file: Could not determine home directory."),
    Case("a chat template that swallows a role", f"train {OWN} data.chat=true data.system=Hi data.chat_template={{tmp}}/t.jinja", "{tmp}/rows.jsonl leaves the train split empty: 0 of 13 rows; dropped: 13 message of the role 'system', of which the chat template writes nothing (first: {tmp}/rows.jsonl:1)", make=lambda p: (own("c")(p), p.write("t.jinja", "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"))),
    Case("a chat without a chat template", f"train {OWN} data.chat=true", "the tokenizer of {lm} has no chat template: give one with data.chat_template=FILE (templates/chatml.jinja is one)", make=own()),
    Case("a line of 1 MB beside others, with a limit", f"train {OWN} data.max_prompt_tokens=8", "1 prompt longer than 8 tokens (first: {tmp}/rows.jsonl:13)", 0, "the row falls and is counted; the run trains on the others", own("film " * 200_000)),
    Case("emoji, right-to-left text, a byte order mark, Windows line ends", f"train {OWN}", "{tmp}/rows.jsonl, train: 12 of 12 rows", 0, "every row", lambda p: p.write("rows.jsonl", b"\xef\xbb\xbf" + "".join(f'{{"q": "{t} {i}"}}\r\n' for i in range(7) for t in ("🎬👨‍👩‍👧", "مرحبا שלום")).encode())),
]  # fmt: skip

MODELS = [
    Case("a folder that is not there", "train model.path=/no/such/folder", "no usable model at '/no/such/folder': there is no such folder; give one with model.path=FOLDER, or a name on the hub"),
    Case("an empty folder", "train model.path={tmp}/model", "no usable model at '{tmp}/model' (model.path): the folder holds no config.json", make=lambda p: (p.tmp / "model").mkdir()),
    Case("a model of the hub, without a network", "train model.path=nobody/nothing", "no usable model at 'nobody/nothing': it is no local folder, not in the hub's cache, and the hub cannot be reached or does not have it; …"),
    Case("a name longer than any file's", f"train model.path={'x' * 300}", f"no usable model at '{'x' * 300}': …"),
    Case("a config.json that is no JSON", "train model.path={tmp}/model", "no usable model at '{tmp}/model' (model.path): …", make=lambda p: (p.model() / "config.json").write_text("{")),
    Case("an architecture that nobody knows", "train model.path={tmp}/model", "no usable model at '{tmp}/model' (model.path): …", make=lambda p: p.edit(p.model() / "config.json", model_type="nope")),
    Case("weights that are cut off", "train model.path={tmp}/model", "no usable model at '{tmp}/model' (model.path): …", kept=FOLDER, make=lambda p: cut(p.model() / "model.safetensors")),
    Case("no weights", "train model.path={tmp}/model", "no usable model at '{tmp}/model' (model.path): …", kept=FOLDER, make=lambda p: (p.model() / "model.safetensors").unlink()),
    Case("weights of another shape", "train model.path={tmp}/model", "no usable model at '{tmp}/model' (model.path): the tensor … has the shape […], but config.json makes it […]; weights and config.json must be of one model", kept=FOLDER, make=lambda p: p.edit(p.model() / "config.json", n_embd=32)),
    Case("more layers than the weights have", "train model.path={tmp}/model", "no usable model at '{tmp}/model' (model.path): it lacks the weights transformer.h.2.…, … and … more of GPT2LMHeadModel; weights and config.json must be of one model", kept=FOLDER, make=lambda p: p.edit(p.model() / "config.json", n_layer=4)),
    Case("quantized weights", "train model.path={tmp}/model", "no usable model at '{tmp}/model' (model.path): its weights are quantized (gptq), which is not supported: give the model in float32, bfloat16 or float16", make=lambda p: p.edit(p.model() / "config.json", quantization_config={"quant_method": "gptq"})),
    Case("whole models on a base in 4 bits", "train reward=vader model.quantize=nf4 model.lora=null", "model.lora=null: must be an adapter's settings with quantize=nf4, whose weights are frozen"),
    Case("an encoder and a decoder", "train model.path={tmp}/model", "no usable model at '{tmp}/model' (model.path): a bart has an encoder and a decoder; PPO needs a decoder alone, such as GPT-2, Llama or Qwen", make=lambda p: p.edit(p.model() / "config.json", model_type="bart", architectures=["BartForConditionalGeneration"])),
    Case("an adapter whose base is not there", "train model.path={tmp}/adapter", "no usable model at '/no/base': …", make=lambda p: p.edit(shutil.copytree(p.run / "adapter", p.tmp / "adapter") / "adapter_config.json", base_model_name_or_path="/no/base")),
    Case("an adapter on itself", "train model.path={tmp}/adapter", "no usable adapter at '{tmp}/adapter': base_model_name_or_path leads back to it; name the base in its adapter_config.json", make=lambda p: p.edit(shutil.copytree(p.run / "adapter", p.tmp / "adapter") / "adapter_config.json", base_model_name_or_path=str(p.tmp / "adapter"))),
    Case("a language model for a reward model", "train reward=learned reward.path={lm}", "reward.path={lm}: there is a GPT2LMHeadModel, but a reward model is a sequence classifier with one output"),
    Case("a reward model with two outputs", "train reward=learned reward.path={tmp}/model", "reward.path={tmp}/model: the model has 2 outputs where 1 is needed", make=lambda p: p.edit(p.model("reward_model") / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})),
]  # fmt: skip

TOKENIZERS = [
    Case("no tokenizer", "train model.path={tmp}/model", "no usable tokenizer at '{tmp}/model' (model.path): its files are not there", kept=FOLDER, make=lambda p: [f.unlink() for f in p.model().glob("tokenizer*")]),
    Case("a tokenizer.json that is cut off", "train model.path={tmp}/model", "no usable model at '{tmp}/model' (model.path): …", kept=FOLDER, make=lambda p: cut(p.model() / "tokenizer.json")),
    Case("a class that reads otherwise than the file", "train model.path={tmp}/model", "the tokenizer at '{tmp}/model' (model.path) is loaded as a GPT2Tokenizer, which reads texts otherwise than its tokenizer.json: set \"tokenizer_class\": \"TokenizersBackend\" in its tokenizer_config.json", kept=FOLDER, make=lambda p: p.edit(p.model() / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")),
    Case("no end-of-text token", "train model.path={tmp}/model", "the tokenizer at '{tmp}/model' has no end-of-text token: set eos_token in its folder", kept=FOLDER, make=lambda p: p.edit(p.model() / "tokenizer_config.json", eos_token=None)),
    Case("the tokenizer of a larger model", "train model.path={tmp}/model", "the tokenizer at '{tmp}/model' has tokens up to id 28, but the model's embedding has 9 rows: …", kept=FOLDER, make=lambda p: p.edit(p.model() / "config.json", vocab_size=9)),
]  # fmt: skip


def cut(file: Any) -> None:
    """The first half of a file, as a copy leaves it that was interrupted."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def torn(p: Place, *numbers: int) -> None:
    """An unfinished run, some of whose checkpoints are cut off."""
    folder = p.unfinished()
    for number in numbers:
        cut(folder / f"checkpoints/iteration-{number}.ckpt")


def foreign(p: Place, content: Any) -> None:
    """An unfinished run whose only checkpoint holds something else, under a right checksum."""
    folder = p.unfinished() / "checkpoints"
    for file in folder.iterdir():
        file.unlink()
    torch.save(content, folder / "new.tmp")
    seal(folder / "new.tmp", folder / "iteration-1.ckpt")


def has(*names: str) -> Make:
    """That these lie in the run's folder."""

    def look(p: Place) -> None:
        there = {str(f.relative_to(p.logs / "ppo" / "tiny")) for f in (p.logs / "ppo" / "tiny").rglob("*")}
        assert set(names) <= there, there

    return look


RUN = "the run's folder as it was"
OLD = has("metrics.csv", "checkpoints/iteration-1.ckpt")
CHECKPOINTS = [
    Case("the newest one torn", "train model.path={lm}", "iteration-2.ckpt in {tmp}/logs/ppo/tiny/checkpoints: damaged; iteration-1.ckpt is used instead", 0, "the run continues from the one before; the torn one is renamed", lambda p: torn(p, 2), RESUMED, has("result.json", "checkpoints/iteration-2.damaged", "checkpoints/iteration-2.ckpt")),
    Case("every one torn", "train model.path={lm}", "none of the checkpoints in {tmp}/logs/ppo/tiny/checkpoints can be read (iteration-2.ckpt, iteration-1.ckpt: damaged): resume=never starts again in another folder", 2, RUN, lambda p: torn(p, 1, 2), RESUMED, OLD),
    Case("made with other settings", "train model.path={lm} ppo.gamma=0.5", "{tmp}/logs/ppo/tiny/checkpoints/iteration-2.ckpt was made with other settings, and these change results: ppo.gamma (1.0 -> 0.5); give the same again, or allow_config_change=true to resume with the change, or resume=never to start again", 2, RUN, Place.unfinished, RESUMED, OLD),
    Case("made with another model", "train model.path={tmp}/model", "the checkpoint was made with other frozen weights (of its roles) than this run has: give the same, or allow_config_change=true to resume with the change, or resume=never to start again", 2, RUN, lambda p: (p.unfinished(), other_weights(p)), RESUMED, OLD),
    Case("code instead of tensors", "train model.path={lm}", "{tmp}/logs/ppo/tiny/checkpoints/iteration-1.ckpt holds more than tensors and plain values, which this project never writes: it was not opened", 2, RUN, lambda p: foreign(p, {"format": 2, "model": shutil.rmtree}), RESUMED, OLD),
    Case("of another version", "train model.path={lm}", "{tmp}/logs/ppo/tiny/checkpoints/iteration-1.ckpt was not written by this version of the project: resume=never starts again", 2, RUN, lambda p: foreign(p, {"format": 0}), RESUMED, OLD),
    Case("a tensor alone", "train model.path={lm}", "{tmp}/logs/ppo/tiny/checkpoints/iteration-1.ckpt was not written by this version of the project: resume=never starts again", 2, RUN, lambda p: foreign(p, torch.zeros(2)), RESUMED, OLD),
    Case("resume=PATH without a checkpoint there", "train resume={tmp}", "resume={tmp}: there is no checkpoint in that folder"),
    Case("resume=PATH of a file that is no checkpoint", "train resume={tmp}/notes.txt", "resume={tmp}/notes.txt: the file is damaged, as its checksum is wrong", make=lambda p: p.write("notes.txt", "hello")),
    Case("resume=PATH that is not there", "train resume=nowhere", "resume='nowhere': must be auto, never, or the path of a checkpoint or a run folder"),
]  # fmt: skip


def other_weights(p: Place) -> None:
    """The same architecture with other numbers."""
    from safetensors.torch import load_file, save_file

    file = p.model() / "model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file, {"format": "pt"})


ASK = "evaluate {run} prompts={tmp}/p.txt out={tmp}/out"
NO_RESULT = "no result folder"
ANSWERED = "every prompt is answered"


def prompts(content: str | bytes) -> Make:
    """A file of prompts, one a line."""
    return lambda p: p.write("p.txt", content)


def answered(number: int) -> Make:
    """That so many rows were written for the policy and for its reference."""

    def look(p: Place) -> None:
        assert len((p.tmp / "out/rows.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")) == 2 * number

    return look


def asked(given: str, content: str | bytes, answer: str, code: int = 2, kept: str = NO_RESULT, number: int = 1) -> Case:
    """A file of prompts that a finished run's policy is to answer."""
    return Case(given, ASK, answer, code, kept, prompts(content), "", answered(number) if code == 0 else None)


PROMPTS = [
    asked("no file", "", "{tmp}/p.txt is empty, but must have one prompt on each line"),
    asked("an empty prompt", "the film\n\na bad\n", "{tmp}/p.txt:2: column 'prompt' must be a text that is not empty, not ''"),
    asked("a prompt of one space", "the film\n \n", "{tmp}/out: result.json, rows.jsonl", 0, ANSWERED, 2),
    asked("invalid UTF-8", b"the film\nna\xefve\n", "{tmp}/p.txt:2 is not valid UTF-8: byte 3 of the line is 0xef"),
    asked("padding tokens only", "<pad> <pad>\n", "{tmp}/out: result.json, rows.jsonl", 0, ANSWERED),
    asked("end tokens only", "<eos><eos>\n", "{tmp}/out: result.json, rows.jsonl", 0, ANSWERED),
    asked("more tokens than the model reads", "the film " * 100, "{tmp}/out: result.json, rows.jsonl", 0, "its end is answered"),
    asked("a line of 1 MB", "film " * 200_000, "{tmp}/out: result.json, rows.jsonl", 0, "its end is answered"),
    asked("emoji", "🎬👨‍👩‍👧\n", "{tmp}/out: result.json, rows.jsonl", 0, ANSWERED),
    asked("right-to-left text", "مرحبا שלום\n\u202ethe film\n", "{tmp}/out: result.json, rows.jsonl", 0, ANSWERED, 2),
    asked("control characters and a line separator", "the\x00 film\u2028a bad\x1b[31m\n", "{tmp}/out: result.json, rows.jsonl", 0, "one prompt, as it is"),
]  # fmt: skip


@contextmanager
def importable(p: Place) -> Iterator[None]:
    """The place is on Python's path, for a module of somebody's own."""
    sys.path.insert(0, str(p.tmp))
    try:
        yield
    finally:
        sys.path.remove(str(p.tmp))


MINE = "train reward=function reward.target=mine"
REWARD = "train reward=function reward.target=tests.errors.rewards"
FIRST = "the run's folder; the same command begins anew"
REWARDS = [
    Case("a module that is not there", "train reward=function reward.target=nope.score", "reward.target=nope.score: there is no module nope in … (the working directory) or among the installed packages"),
    Case("a function that is not there", f"{REWARD}.nothingg", "reward.target=tests.errors.rewards.nothingg: tests/errors/rewards.py has no nothingg; close to it: nothing"),
    Case("a module for a function", REWARD, "reward.target=tests.errors.rewards: is a module, not a function; give tests.errors.rewards.nothing or …"),
    Case("a file for a function", "train reward=function reward.target=./my_rewards.py:brevity", "reward.target=./my_rewards.py:brevity: write it with dots and without .py: my_rewards.brevity"),
    Case("a module that needs one that is not installed", f"{MINE}.score", "reward.target=mine.score: importing {tmp}/mine.py failed: No module named 'nope' (line 1)", make=lambda p: p.write("mine.py", "import nope"), within=importable),
    Case("a module that raises when it is imported", f"{MINE}.score", "reward.target=mine.score: importing {tmp}/mine.py raised RuntimeError('no key set') (line 1)", make=lambda p: p.write("mine.py", "raise RuntimeError('no key set')"), within=importable),
    Case("a function of two parameters", f"{REWARD}.two", "reward.target='tests.errors.rewards.two': must be a function of (prompts, responses, metadata)"),
    Case("a function that returns nothing", f"{REWARD}.nothing", "reward tests.errors.rewards.nothing returned None for 2 responses: one number for each is needed (tried with 2 made-up rows)"),
    Case("the same in a pipeline", "pipeline reward=function reward.target=tests.errors.rewards.nothing", "reward tests.errors.rewards.nothing returned None for 2 responses: one number for each is needed (tried with 2 made-up rows)", base="log_dir={tmp}/logs"),
    Case("a function that raises", f"{REWARD}.raises", "reward tests.errors.rewards.raises raised KeyError('stars') for prompt …; a score must be a finite number", kept=FIRST),
    Case("a score that is no number", f"{REWARD}.not_a_number", "reward tests.errors.rewards.not_a_number gave nan for prompt …; a score must be a finite number", kept=FIRST),
    Case("too few scores", f"{REWARD}.one_score", "reward tests.errors.rewards.one_score returned 1 number for 2 responses: one number for each is needed (tried with 2 made-up rows)"),
    Case("words instead of scores", f"{REWARD}.words", "reward tests.errors.rewards.words gave 'good' for prompt …; a score must be a finite number", kept=FIRST),
    Case("no answer in time", f"{REWARD}.sleeps ppo.reward_timeout=0.5", "reward tests.errors.rewards.sleeps gave no answer within 0.5 s (ppo.reward_timeout) (tried with 2 made-up rows)"),
    Case("a column that the data lack", "train reward=exact_match", "the data has no column 'answer', only …", kept=FIRST),
    Case("a server that is not there", "train reward=http reward.url=http://127.0.0.1:9 reward.patience=0.01", "reward server http://127.0.0.1:9: … failed attempts for 8 texts, …: All connection attempts failed", kept=FIRST),
    Case("an address with a password", "train reward=http reward.url=http://me:secret@127.0.0.1:9", "reward.url: a password or key in an address would be stored with the run; put it into the environment variable that reward.token_variable names (REWARD_TOKEN): a token, or a whole header as 'Basic ...'"),
    Case("a rollout engine that is not installed", "train engine=vllm", "vLLM is not installed here: `make vllm` makes an environment with it and this repository (docs/engines.md); then start the command by .venv-vllm/bin/python"),
    Case("a rollout server that is not there", "train engine=vllm_server rollout.engine.urls=[http://127.0.0.1:9] rollout.engine.patience=0.01", "no rollout server answers (http://127.0.0.1:9: All connection attempts failed); start it by `python -m src.serve_rollout MODEL` (docs/engines.md)", kept=FIRST),
    Case("an address of another kind", "train reward=http reward.url=ftp://x", "reward.url='ftp://x': must be an address that starts with http:// or https://"),
    Case("a pattern that is no regular expression", "train reward=regex reward.pattern=\"'('\"", "reward.pattern='(': must be a regular expression of Python's re (missing ), unterminated subpattern at position 0)"),
]  # fmt: skip


@contextmanager
def read_only(p: Place) -> Iterator[None]:
    """Root may write where it has no right to, so for root it is a mount."""
    if os.geteuid() == 0:
        with mounted(p.tmp / "small", "ro"):
            yield
    else:
        (p.tmp / "small").mkdir(mode=0o500)
        yield


@contextmanager
def full(p: Place) -> Iterator[None]:
    """A file system on which a checkpoint or two have room; what is kept is looked at before it goes."""
    with mounted(p.tmp / "small", "size=1500k"):
        yield
        saved = checkpoints(p.tmp / "small/ppo/full/checkpoints")
        assert saved
        assert all(map(checksum_matches, saved))
        assert (p.tmp / "small/ppo/full/metrics.csv").is_file()


@contextmanager
def quota(p: Place) -> Iterator[None]:
    """No file may be larger than half a checkpoint."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (p.logs / "ppo/tiny/checkpoints/iteration-1.ckpt").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def once(p: Place) -> None:
    """An unfinished run that was killed after its first checkpoint."""
    (p.unfinished() / "checkpoints/iteration-2.ckpt").unlink()


def first_is_whole(p: Place) -> None:
    """The first checkpoint, and nothing half-written beside it."""
    OLD(p)
    (only,) = (p.logs / "ppo/tiny/checkpoints").iterdir()
    assert checksum_matches(only)


DISK = [
    Case("a read-only folder", "train log_dir={tmp}/small", "log_dir={tmp}/small: cannot write to {tmp}/small/ppo/… (…)", within=read_only),
    Case("a disk that becomes full", "train log_dir={tmp}/small name=full ppo.num_iterations=40 callbacks.checkpoint.keep=40", "{tmp}/small/ppo/full/checkpoints/iteration-….ckpt could not be written (No space left on device): {tmp}/small/ppo/full/checkpoints/iteration-….ckpt is kept as it was; make room, then the same command resumes", kept="the run's folder with every checkpoint before", within=full),
    Case("a quota on the size of files", "train model.path={lm}", "{tmp}/logs/ppo/tiny/checkpoints/iteration-2.ckpt could not be written (File too large): {tmp}/logs/ppo/tiny/checkpoints/iteration-1.ckpt is kept as it was; make room, then the same command resumes", 2, "the checkpoint before", once, RESUMED, first_is_whole, quota),
    Case("a file where a folder is wanted", "train log_dir={tmp}/file", "log_dir={tmp}/file: cannot write to {tmp}/file/ppo/… (Not a directory)", make=lambda p: p.write("file", "")),
    Case("a result folder that is not empty", "evaluate {run} prompts={tmp}/p.txt out={tmp}", "{tmp} exists and is not empty: remove it, or choose another folder with out=FOLDER", kept="the folder as it was", make=prompts("the film"), base=""),
    Case("a folder that is no run", "evaluate {tmp} prompts={tmp}/p.txt", "{tmp}: neither a run (no config.yaml) nor a model (no config.json) is in this folder", make=prompts("the film"), base=""),
    Case("a run without a checkpoint, to be exported", "export {tmp}/logs/ppo/tiny", "{tmp}/logs/ppo/tiny: the run is unfinished and has no checkpoint yet", kept=RUN, make=lambda p: shutil.rmtree(p.unfinished() / "checkpoints"), base="", check=has("metrics.csv")),
]  # fmt: skip

GROUPS = {
    "Configuration": CONFIG,
    "Data files": DATA,
    "Model folders": MODELS,
    "Tokenizers": TOKENIZERS,
    "Checkpoints": CHECKPOINTS,
    "Prompts": PROMPTS,
    "Rewards": REWARDS,
    "Folders": DISK,
}
