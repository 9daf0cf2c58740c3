"""What is given and cannot be read is answered with one sentence that names the key and how to mend it."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
from typing import Any

import pytest
from lightning.pytorch import Trainer
from pydantic import ValidationError

from src.config.compose import compose
from src.config.errors import closest, declared, explain_validation, format_value, repeated, unknown_key
from src.config.files import groups, options
from src.config.schema import MEANT, NOT_OF_TRAINER, OPEN, WHY_NOT
from src.errors import ConfigError
from tests.config.composed import composed


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        compose(list(overrides))
    assert "\n" not in str(refused.value)
    return str(refused.value)


OPTIONS = "cispo, clip, dual_clip, gspo, kl_penalty, reinforce, trpo"
REFUSED = [
    # keys and options that do not exist
    ("ppo.clipp=0.1", "ppo.clipp=0.1: there is no key ppo.clipp; close to it: ppo.clip, ppo.clip_low"),
    ("polcy_loss=clip", "close to it: policy_loss"),
    ("lr=1", "close to it: ppo.lr, reward_model.lr, sft.lr"),
    ("lr_schedule=linear", "close to it: ppo.lr_schedule, reward_model.lr_schedule, sft.lr_schedule"),
    ("zzz=1", "zzz=1: there is no key zzz; `--help` lists the keys"),
    ("policy_loss=nope", f"policy_loss=nope: there is no such option; the options are {OPTIONS}"),
    ("model=gpt3", "model=gpt3: there is no such option; close to it: gpt2; the options are digits, gpt2"),
    ("experiment=quik", "experiment=quik: there is no such option; close to it: quick; the options are "),
    ("reward=functions", "reward=functions: there is no such option; close to it: function; the options are "),
    ("model=base", "model=base: there is no such option; the options are digits, gpt2"),
    ("trainer=null", "trainer=null: there is no such option; the options are ddp, default"),
    ("experiment=[quick]", "experiment=[quick]: there is no such option"),
    ("kl_estimator=none", "kl_estimator=none: there is no such option; the options are exact, k1, k2, k3"),
    ("stage=nope", "stage='nope': must be sft or reward or ppo"),
    ("stage=[1]", "stage=[1]: must be sft or reward or ppo"),
    ("stage=???", "stage must be given"),
    ("overrides=[1]", "there is no key overrides"),
    # keys of options that are not chosen
    ("policy_loss=reinforce ppo.clip=0.2",
     "ppo.clip=0.2: nothing reads ppo.clip here, it belongs to policy_loss=clip or policy_loss=dual_clip"),
    ("ppo.dual_clip=3", "it belongs to policy_loss=dual_clip"),
    ("value_loss=mse ppo.value_clip=1", "it belongs to value_loss=clipped"),
    ("ppo.early_stop.window=3", "it belongs to early_stop=gold"),
    ("trainer.num_nodes=2", "it belongs to trainer=ddp"),
    ("data.path=x.csv", "nothing reads data.path here, it belongs to data=custom or data=custom_texts"),
    ("model=gpt2 model.scratch.config.n_layer=2", "model.scratch has no keys here: it is null or follows another key"),
    ("stage=sft sft.lora.rank=2", "sft.lora.rank=2: sft.lora has no keys here: it is null or follows another key"),
    ("ppo.samples={every:1,foo:2}", "there is no key ppo.samples.foo; close to it: ppo.samples"),
    # groups that another option brings along
    ("advantage=rloo value_loss=clipped",
     "value_loss=clipped: value_loss is part of advantage=baseline_value or gae or td alone: choose one of these, or "
     "leave value_loss out"),
    ("kl=none kl_estimator=k1", "kl_estimator is part of kl=both or loss or reward alone"),
    ("policy_loss=trpo old_kl_controller=fixed", "old_kl_controller is part of policy_loss=cispo or clip or"),
    # what cannot be read
    ("ppo.clip", "ppo.clip: write ppo.clip=VALUE"),
    ("ppo.clip 0.1", "ppo.clip 0.1: write ppo.clip=0.1"),
    ("seed=2 model gpt2", "model gpt2: write model=gpt2"),
    ("ppo.clip ppo.lr=1", "ppo.clip: write ppo.clip=VALUE"),
    ("ppo.clap", "'ppo.clap' cannot be read as key=value; a value with = , : or spaces needs quotes in quotes"),
    ("=3", "'=3' cannot be read as key=value"),
    ("model.path=a=b", "needs quotes in quotes: \"key='a=b'\""),
    ("policy_loss=clip,dual_clip", "policy_loss=clip,dual_clip: only a sweep (-m) reads it"),
    ("hydra.run.dir=x", "hydra.run.dir=x: only a sweep (-m) reads it"),
    ("name=\udcff", "b'name=\\xff' is not valid UTF-8"),
    ("ppo.clip=${nope}", "ppo.clip: Interpolation key 'nope' not found"),
    ("reward=keyword", "reward.keywords must be given with these choices: add reward.keywords=..."),
    ("experiment=movie_reviews", "data.path must be given with these choices: add data.path=..."),
    # values, as Hydra reads them; more of them below
    ("ppo.clip=abc", "ppo.clip='abc': must be a number"),
    ("model.path=5", "model.path=5: must be a text, or null"),
    ("seed=true", "seed=true: must be a whole number"),
    ("ppo.lr=inf", "ppo.lr=inf: must be a finite number"),
    ("ppo.num_iterations=99999999999999999999", "ppo.num_iterations=99999999999999999999: must be at most 9223372036"),
    ("model.lora.targets=[1,2]", "model.lora.targets=[1, 2]: must be a text or a list in which each is a text"),
    ("reward=mix +reward.parts.x=1", "reward.parts.x=1: must be a group of keys"),
    ("data=tldr data.pairs.columns.text=5", "data.pairs.columns.text=5: must be a text"),
    ("resume=maybe", "resume='maybe': must be auto, never, or the path of a checkpoint or a run folder"),
    ("trainer=ddp trainer.strategy._target_=os.system", "must be 'src.utils.launch.SummedGradients'"),
    ("~callbacks.checkpoint", "~callbacks.checkpoint: every run reads callbacks.checkpoint, so it cannot be removed"),
    ("~trainer.devices", "~trainer.devices: every run reads trainer.devices, so it cannot be removed"),
    ("~callbacks.stop.grace_seconds", "every run reads callbacks.stop.grace_seconds, so it cannot be removed"),
    ("~callbacks.rollout", "~callbacks.rollout: there is no key callbacks.rollout to remove"),
    ("~logger.nope", "~logger.nope: there is no key logger.nope to remove"),
]  # fmt: skip


@pytest.mark.slow
def test_what_cannot_be_read_or_used_is_refused() -> None:
    for overrides, words in REFUSED:
        found = refusal(*overrides.split())
        assert words in found, (overrides, found)
        assert "base" not in re.split(r"[\s,;:=.]+", found.replace("model=base", "")), found  # a hidden file


VALUES: list[tuple[str, Any, str]] = [
    ("ppo.clip", None, "ppo.clip=null: must be a number"),
    ("ppo.score_clip", "abc", "ppo.score_clip='abc': must be a number, or null"),
    ("ppo.whiten_advantages", 1, "ppo.whiten_advantages=1: must be true or false"),
    ("seed", "abc", "seed='abc': must be a whole number"),
    ("ppo.epochs", 1.5, "ppo.epochs=1.5: must be a whole number"),
    ("ppo", 3, "ppo=3: must be a group of keys"),
    ("ppo.value_loss", None, "ppo.value_loss=null: must be a group of keys"),
    ("ppo.advantage", None, "ppo.advantage=null: must be a group of keys"),
    ("ppo.kl_estimator", None, "ppo.kl_estimator=null: must be a group of keys"),
    ("ppo.kl_in", "loss", "ppo.kl_in='loss': must be 'reward'"),
    ("model.lora", 5, "model.lora=5: must be a group of keys, or null"),
    ("model.lora.targets", {}, "model.lora.targets={}: must be a text or a list"),
    ("rollout.temperature", math.nan, "rollout.temperature=nan: must be a finite number"),
    ("ppo.max_grad_norm", -math.inf, "ppo.max_grad_norm=-inf: must be greater than 0"),
    ("ppo.clip", 1.5, "ppo.clip=1.5: must be less than 1"),
    ("ppo.clip", 0, "ppo.clip=0: must be greater than 0"),
    ("ppo.lam", 2, "ppo.lam=2: must be at most 1"),
    ("ppo.gamma", -0.1, "ppo.gamma=-0.1: must be at least 0"),
    ("ppo.lr_schedule", "constant", "ppo.lr_schedule='constant': must be 'linear', 'cosine' or 'constant_with_warmup'"),
    ("trainer.precision", "16-mixed", "trainer.precision='16-mixed': must be '32-true' or 'bf16-mixed'"),
    ("trainer.precision", "16-true", "trainer.precision='16-true': must be '32-true' or 'bf16-mixed'"),
    ("trainer.precision", "bf16-true", "trainer.precision='bf16-true': must be '32-true' or 'bf16-mixed'"),
    ("trainer.precision", "64-true", "trainer.precision='64-true': must be '32-true' or 'bf16-mixed'"),
    ("trainer.precision", "transformer-engine", "must be '32-true' or 'bf16-mixed'"),
    ("trainer.precision", 16, "trainer.precision=16: must be '32-true' or 'bf16-mixed'"),
    ("name", "../x", "name='../x': must be the name of a folder: no slash, no dot in front, at most 100 characters"),
    ("sweep_metric", "x", "sweep_metric='x': must be a figure of this stage's result.json, as ppo.score"),
    ("sweep_metric", "ppo.nope", "sweep_metric='ppo.nope': must be a figure of this stage's result.json, as ppo.score"),
]


def test_each_wrong_value_gets_its_key_and_what_it_must_be() -> None:
    run = composed()
    for key, value, words in VALUES:
        plain: dict[str, Any] = copy.deepcopy(run.plain())
        *above, name = key.split(".")
        functools.reduce(dict.__getitem__, above, plain)[name] = value
        with pytest.raises(ValidationError) as refused:
            type(run).model_validate(plain)
        found = explain_validation(refused.value, plain, [f"{key}={value}"])
        assert words in found
        assert "\n" not in found


def test_a_wrong_value_that_was_given_is_named_before_one_that_follows_from_it() -> None:
    """ppo.clip_low and others follow ppo.clip and are wrong as well."""
    assert refusal("ppo.clip=2").startswith("ppo.clip=2: ")
    assert refusal("ppo.lr=-1").startswith("ppo.lr=-1: ")


# ------------------------------------------------------------------------------------------------ adding and removing


def test_plus_adds_only_where_keys_are_open() -> None:
    for override, words in {
        "+ppo.weight_decay=0.1": "there is no key ppo.weight_decay; close to it: reward_model.weight_decay, sft.weight",
        "+rollout.top_p=0.5": "is not supported; tokens are drawn from the whole distribution",
        "+foo.bar=1": "there is no key foo.bar",
        "++ppo.lr=1": "++ppo.lr=1: write ppo.lr=VALUE",
        "+ppo.lr=1": "+ppo.lr=1: write ppo.lr=VALUE",
        "+policy_loss=clip": "+policy_loss=clip: write policy_loss=VALUE",
        "+trainer=ddp": "+trainer=ddp: write trainer=VALUE",
        "+ppo.advantage.gamma=0.5": "there is no key ppo.advantage.gamma",
        "+choices.x=1": "there is no key choices.x",
        "~ppo.lr": "~ppo.lr: write ppo.lr=VALUE",
        "~advantage": "~advantage: write advantage=VALUE",
    }.items():
        found = refusal(override)
        assert words in found
        assert found.endswith(f"; + and ~ add and remove keys of {', '.join(OPEN)} alone")


def test_plus_serves_the_open_nodes() -> None:
    run = composed("+trainer.benchmark=true", "+callbacks.mine._target_=a.B", "++logger.mine._target_=a.B",
                   "reward=mix", "+reward.parts.own._target_=src.rewards.vader.Vader", "+reward.weights.own=2",
                   "~reward.parts.length", "~reward.weights.length")  # fmt: skip
    plain = run.plain()
    assert plain["trainer"]["benchmark"] is True
    assert plain["callbacks"]["mine"] == plain["logger"]["mine"] == {"_target_": "a.B"}
    assert set(plain["reward"]["parts"]) == set(plain["reward"]["weights"]) == {"sentiment", "own"}
    assert "csv" not in composed("~logger.csv").plain()["logger"]


def test_a_key_of_an_open_node_without_plus_is_told_of_it() -> None:
    for override in ("trainer.benchmark=true", "callbacks.mine.x=1", "logger.mine=3"):
        assert refusal(override).endswith(f"; + adds one to {override.split('.')[0]}: +{override}")
    assert "; + adds one to reward.parts: +reward.parts={a:{x:1}}" in refusal("reward=mix", "reward.parts={a:{x:1}}")


# --------------------------------------------------------------------------------------- names that people give


def keys_named(sentence: str) -> list[str]:
    """The dotted keys of a sentence, without the value of `key=value`."""
    return [key for key in re.findall(r"(?<![\w=.])[a-z_]+(?:\.[a-z_]+)+", sentence)]


def test_every_key_that_people_mean_is_answered_with_keys_that_exist() -> None:
    assert refusal("ppo.learning_rate=1") == "ppo.learning_rate=1: there is no key ppo.learning_rate; use ppo.lr"
    assert refusal("stage=sft", "sft.epochs=1").endswith("there is no key sft.epochs; use sft.steps")
    for key, meant in MEANT.items():
        assert unknown_key(key, f"{key}=1") == f"{key}=1: there is no key {key}; use {meant}"
        assert key not in declared()
        assert keys_named(meant), meant
        for named in keys_named(meant):
            assert named in declared(), named
    for group, option in re.findall(r"\b(\w+)=([\w.]+)", " ".join(MEANT.values())):
        assert option in options(group)


def test_every_reason_against_a_key_names_keys_that_exist() -> None:
    for key, why in WHY_NOT.items():
        assert f"{key}=1: is not supported; {why}" in refusal(f"{key}=1")
        for named in keys_named(why):
            assert named in declared(), named
        for group, option in re.findall(r"(?<![\w.])(\w+)=([\w.]+)", why):
            assert option in options(group), why
    assert "model.quantize" in keys_named(WHY_NOT["model.load_in_4bit"])
    assert "rollout.temperature" in keys_named(WHY_NOT["rollout.top_p"])


def test_each_argument_of_the_trainer_that_means_something_else_here_is_refused_with_what_does_it() -> None:
    known = set(inspect.signature(Trainer).parameters)
    for name, why in NOT_OF_TRAINER.items():
        assert name in known
        found = refusal(f"+trainer.{name}=1")
        assert re.fullmatch(rf"\+?trainer\.{name}=1: is not supported; {re.escape(why)}", found)
    for name in ("max_steps", "fast_dev_run", "gradient_clip_val", "accumulate_grad_batches", "val_check_interval"):
        named = [*keys_named(NOT_OF_TRAINER[name]), *re.findall(r"\b(\w+)=\w+", NOT_OF_TRAINER[name])]
        assert named
        assert all(key in declared() or key in groups() for key in named)


# ----------------------------------------------------------------------------------------------- small parts


def test_similar_names_are_found_by_their_end_and_by_their_letters() -> None:
    assert closest("ppo.check_every") == "close to it: rollout.check_every"
    assert closest("rollout.temprature") == "close to it: rollout.temperature"
    assert closest("qqqqq") == "`--help` lists the keys"
    assert unknown_key("ppo.lam", "x") == "x: nothing reads ppo.lam here, it belongs to advantage=gae"


def test_what_is_given_again_is_named() -> None:
    given = ["experiment=quick", "ppo.lr=1", "experiment=none", "ppo.lr=1", "seed=2"]
    assert repeated(given) == ["experiment=quick is overridden by experiment=none"]
    assert repeated(["seed=1", "seed=2", "seed=3"]) == [f"seed={n} is overridden by seed=3" for n in (1, 2)]


def test_values_are_written_as_in_yaml_and_cut() -> None:
    assert [format_value(value) for value in (None, True, False, 1, 0.5, "a", "True", [1])] == [
        "null", "true", "false", "1", "0.5", "'a'", "'True'", "[1]",
    ]  # fmt: skip
    assert format_value("x" * 999) == f"'{'x' * 75} ..."
