"""Every file under conf/ composes, is commented, is read, and makes objects."""

import re
import shutil
from functools import cache

import pytest
from omegaconf import DictConfig, OmegaConf

from src.config.compose import compose, instantiate, leaves, resolve, source_key, with_value
from src.config.errors import CONF, declarations, repeated
from src.config.validate import preflight
from src.errors import ConfigError
from tests import families

STAGES = ("sft", "reward", "ppo")
ROOT = CONF.parent
FILES = sorted(CONF.rglob("*.yaml"))
INTERNAL = ("experiment", "recipe", "stage")  # tried as themselves below
# an option that is a schema or needs a value that only the user knows -> what makes it whole
NEEDS = {
    "model=base": ["model.name=mine", "model.path=here"],
    "data=movie_reviews": ["data.path=here"],
    "reward_net=pretrained": ["reward_model.net.path=here"],
    "reward=function": ["reward.target=math.fsum"],
    "reward=http": ["reward.url=http://localhost:1"],
    "reward=keyword": ["reward.keywords=[good]"],
    "reward=regex": ["reward.pattern=good"],
    "experiment=movie_reviews": ["data.path=here"],
    "data=base": ["data.path=here"],
    "data=custom": ["data.path=here"],
    "data=custom_texts": ["data.path=here"],
}
OPTIONS = [
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in FILES
    if path.parent != CONF and path.parent.name not in INTERNAL
]
EXPERIMENTS = [
    f"experiment={path.stem}" for path in sorted((CONF / "experiment").glob("*.yaml")) if path.stem != "none"
]


@cache
def composed(*overrides):
    config = compose(list(overrides))
    config.run_dir = "/tmp/never-written"
    return config


def with_option(stage, option):
    """The configuration of a stage with this option; the stage's own one where that has it anyway."""
    default = composed(f"stage={stage}")
    group, name = option.split("=")
    return default if default.choices.get(group) == name else composed(f"stage={stage}", option, *NEEDS.get(option, []))


def stages_of(option):
    """The stages whose file pulls the option's group in; all of them where train.yaml does, but for presets."""
    group = option.split("=")[0]
    if group == "preset":
        return ("ppo",)  # the others refuse it: tests/config/test_presets.py
    if any(group in entry for entry in OmegaConf.load(CONF / "train.yaml").defaults if entry != "_self_"):
        return STAGES
    return [
        s for s in STAGES if any(f"/{group}" in entry for entry in OmegaConf.load(CONF / f"stage/{s}.yaml").defaults)
    ]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_makes_its_cheap_objects(option):
    stages = stages_of(option)
    assert stages
    for stage in stages:
        config = with_option(stage, option)
        resolve(config)
        instantiate(config.model)
        for name in config.checks:
            instantiate(config.checks[name])
        for name in config.callbacks:
            instantiate(config.callbacks[name])
        if stage == "ppo":
            instantiate(config.gold_reward)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The folders that stand for the models of the hub: architecture and context of each, without its size."""
    folders = {family: tmp_path_factory.mktemp("hub") for family in families.CLASSES}
    for family, folder in folders.items():
        families.config_of(family, families.tokenizer_of(family)).save_pretrained(folder)
    return folders


@pytest.mark.parametrize("option", EXPERIMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_experiment_passes_preflight_in_every_stage(option, stage, hub):
    model = composed(f"stage={stage}", option, *NEEDS.get(option, [])).choices.model
    path = [with_value("model.path", str(hub[model]))] if model in hub else []
    preflight(composed(f"stage={stage}", option, *NEEDS.get(option, []), *path))


def test_a_recipe_belongs_to_an_experiment_and_a_stage():
    experiments = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    for path in (CONF / "recipe").glob("*.yaml"):
        chosen, _, stage = path.stem.rpartition("_")
        assert any(chosen == e or chosen.startswith(f"{e}_") for e in experiments), path
        assert stage in STAGES


# --------------------------------------------------------------------------------------------------- comments


def uncommented(text):
    """Keys with a plain value and no comment on their line or just above.

    Not asked of: `_target_` and the like, pure references (the key they point to has the comment), what lies inside a
    node with a `_target_` that wires a stage together, entries of a defaults list, and library constants (GPT-2 terms
    like n_head are commented where they first occur, dropout rates are not).
    """
    lines, found = text.splitlines(), []
    inside: list[tuple[int, bool]] = []
    for number, line in enumerate(lines):
        match = re.match(r"^( *)([\w./]+):(.*)$", line)
        if not match:
            continue
        indent, key, rest = len(match[1]), match[2], match[3]
        while inside and inside[-1][0] >= indent:
            inside.pop()
        in_target = any(flag for _, flag in inside)
        following = next((later for later in lines[number + 1 :] if later.strip()), "")
        if not rest.split("#")[0].strip():
            inside.append((indent, bool(re.match(rf"^ {{{indent + 1},}}_target_:", following)) or key == "defaults"))
            continue
        above = lines[number - 1].strip() if number else ""
        pure = re.fullmatch(r"\s*\$\{[^}]+\}\s*", rest)
        if not (key.startswith("_") or pure or in_target or "#" in rest or above.startswith("#")):
            found.append(key)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_has_a_comment(path):
    text = path.read_text(encoding="utf-8")
    if path.parent.name in ("recipe", "experiment"):
        return  # they give values to keys that are commented where they are declared
    assert re.search(r"^# (?!@package)", text, re.MULTILINE) or path.parent.name in ("trainer", "callbacks"), (
        "no headline"
    )
    text = text.split("\nhydra:")[0]  # Hydra's own keys are documented by Hydra
    names = [
        key for key in uncommented(text) if key not in ("stage", "progress_unit", "name", "path", "attn_implementation")
    ]
    assert names == []


def test_the_comment_rule_can_fail():
    assert uncommented("# headline\n\na: 1\nb:\n  c: 2\n  d: 3  # said\n  e: ${a}\n") == ["a", "c"]
    assert uncommented("b:\n  _target_: x\n  c: 2\n# said\nd: 1\n") == []


# ---------------------------------------------------------------------------------------------------- readers


@cache
def references():
    """Everything that conf/ refers to as ${key} and everything that src/ reads as config.key."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"\$\{([\w.]+)\}", text))
    for path in re.findall(r"config\.([\w.]+)", source):  # config.log_dir, and config.a.b.split(...) too
        named |= {".".join(path.split(".")[:end]) for end in range(1, path.count(".") + 2)}
    by_name = {name for name in re.findall(r'"([\w.]+)"', source) if name in ("reward_model",)}
    return named | by_name


def is_read(key, plain):
    """A key is read when it, or a node above it, is referred to or is an argument of a `_target_`."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in references() and (end == len(parts) or "_target_" in node_at(plain, parts[:end])):
            return True
        if "_target_" in node_at(plain, parts[: end - 1]):
            return True
    return parts[0] in {"callbacks", "logger", "checks", "hydra"}


def node_at(node, parts):
    for part in parts:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def unread(config):
    plain = OmegaConf.to_container(config, resolve=False)
    return [k for k in leaves(config) if k.split(".")[0] not in ("overrides", "choices") and not is_read(k, plain)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_is_read(stage):
    for option in OPTIONS:
        if stage in stages_of(option):
            assert unread(with_option(stage, option)) == [], option


def test_the_reader_rule_can_fail():
    assert set(unread(compose(["+ppo.nobody=1", "+rollout.speed=1"]))) == {"ppo.nobody", "rollout.speed"}


def test_a_recipes_knob_falls_away_with_the_option_that_reads_it():
    assert composed("ppo.value_clip=0.7").ppo.value_clip == 0.7
    assert "value_clip" not in composed("value_loss=mse", "experiment=sentiment").ppo


def test_declarations_know_who_declares_a_key():
    found = declarations()
    assert found["ppo.dual_clip"] == ["policy_loss=dual_clip"]
    assert found["ppo.clip"] == ["policy_loss=clip", "policy_loss=dual_clip"]
    assert found["ppo.num_iterations"] == ["stage=ppo"]
    assert found["model.lora.rank"] == ["model=base"]
    assert found["seed"] == [""]


# --------------------------------------------------------------------------------------------- knobs and refusals


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["policy_loss=clip", "ppo.clip=0.3"], "ppo.policy_loss.clip_high", 0.3),
        (["policy_loss=dual_clip", "ppo.clip=0.3", "ppo.dual_clip=4"], "ppo.policy_loss.clip_low", 0.3),
        (["policy_loss=dual_clip", "ppo.dual_clip=4"], "ppo.policy_loss.dual_clip", 4),
        (["ppo.clip=0.3", "ppo.clip_high=0.4"], "ppo.policy_loss.clip_high", 0.4),
        (["value_loss=clipped", "ppo.value_clip=0.5"], "ppo.value_loss.value_clip", 0.5),
        (["kl_controller=adaptive", "ppo.kl_target=3"], "ppo.kl_controller.kl_target", 3),
        (["missing_eos=subtract", "ppo.missing_eos_penalty=2"], "ppo.missing_eos.missing_eos_penalty", 2),
        (["ppo.lam=0.9"], "ppo.advantage.critic_lam", 0.9),
        (["ppo.lr=1e-5", "experiment=none"], "module.critic_optimizer.lr", 1e-5),
        (["experiment=quick"], "ppo.num_iterations", 4),
        (["experiment=quick", "ppo.num_iterations=7"], "ppo.num_iterations", 7),  # the command line has the last word
        (["model.lora=null"], "model.lora", None),
        (["model.lora.layers=2"], "model.lora.layers", 2),
    ],
)
def test_a_knob_reaches_its_reader(overrides, key, value):
    assert OmegaConf.select(composed(*overrides), key) == value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ppo.clipp=0.1"], "no key ppo.clipp; close to it: ppo.clip"),
        (["polcy_loss=clip"], "close to it: policy_loss"),
        (["lr=1"], "close to it: ppo.lr, reward_model.lr, sft.lr"),
        (["zzz=1"], "`--cfg job` lists"),
        (
            ["policy_loss=nope"],
            "policy_loss=nope: there is no such option; the options are cispo, clip, dual_clip, gspo, kl_penalty, "
            "reinforce, trpo",
        ),
        (["stage=nope"], "the options are ppo, reward, sft"),
        (["stage=sft", "ppo.clip=0.2"], "stage=sft does not read ppo.clip, only stage=ppo does"),
        (["stage=sft", "policy_loss=clip"], "stage=sft does not read policy_loss, only stage=ppo does"),
        (["ppo.dual_clip=3"], "it belongs to policy_loss=dual_clip"),
        (["value_loss=mse", "ppo.value_clip=1"], "it belongs to value_loss=clipped"),
        (["ppo.clip"], "cannot be read as key=value"),
        (["model.path=a=b"], "needs quotes inside quotes"),
        (["policy_loss=clip,dual_clip"], "Ambiguous value"),
        (["ppo.clip=abc"], "ppo.clip='abc': must be a number, like 0.2"),
        (["ppo.clip=null"], "ppo.clip=null: must be a number"),
        (["ppo.score_clip=abc"], "ppo.score_clip='abc': must be a number or null"),
        (["ppo.whiten_advantages=1"], "must be true or false"),
        (["seed=abc"], "seed='abc': must be a whole number, like 1"),
        (["ppo.epochs=1.5"], "ppo.epochs=1.5: must be a whole number"),
        (["ppo=3"], "ppo=3: must be a group of keys"),
        (["ppo.value_loss=null"], "ppo.value_loss=null: must be a group of keys"),
        (["resume=maybe"], "resume='maybe': must be auto, never, or the path of a checkpoint or a run folder"),
    ],
)
def test_what_means_nothing_is_refused(overrides, words):
    with pytest.raises(ConfigError) as refused:
        compose(overrides)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=movie_reviews"], "data.path must be given with these choices: add data.path=..."),
        (["ppo.clip=${nope}"], "ppo.clip: Interpolation key 'nope' not found"),
    ],
)
def test_what_is_missing_is_said(overrides, words):
    with pytest.raises(ConfigError) as refused:
        resolve(compose(overrides))
    assert str(refused.value) == words


def test_what_an_experiment_sets_of_its_own_data_falls_away_with_them() -> None:
    """experiment=quick makes its embedded reviews few; other data have no such number, unless one is asked for."""
    own = ["data=custom", "data.path=rows.jsonl", "data.columns.prompt=q", "reward=vader"]
    config = compose(["experiment=quick", *own])
    resolve(config)
    assert "n_reviews" not in config.data
    assert compose(["experiment=quick"]).data.n_reviews == 2400
    with pytest.raises(ConfigError, match=r"nothing reads data\.n_reviews, set by the command line"):
        resolve(compose(["experiment=quick", *own, "data.n_reviews=4"]))


@pytest.mark.parametrize(
    ("folder", "key"),
    [
        ("experiment/bad.yaml", "set by experiment=bad;"),
        ("recipe/bad_tiny_ppo.yaml", "bad_tiny_ppo"),
        ("preset/bad.yaml", "set by preset=bad;"),
    ],
)
def test_a_key_of_an_experiment_that_nothing_reads_is_refused(tmp_path, monkeypatch, folder, key):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    for group in ("experiment", "preset"):
        (conf / group / "bad.yaml").write_text("# @package _global_\n{}\n")
    (conf / folder).write_text("# @package _global_\nppo:\n  clipp: 0.1\n")
    for module in ("compose", "errors"):
        monkeypatch.setattr(f"src.config.{module}.CONF", conf)
    with pytest.raises(ConfigError, match=r"nothing reads ppo\.clipp, set by .*close to it: ppo\.clip") as refused:
        compose(["experiment=bad", "preset=bad"])
    assert key in str(refused.value)


@pytest.mark.parametrize("node", ["model", "ppo.policy_loss", "ppo.advantage", "callbacks.samples", "checks.settings"])
def test_an_unknown_argument_of_a_target_fails(node):
    config = compose([f"+{node}.nonsense=1"])
    with pytest.raises(ConfigError, match=f"{node.split('.')[0]}.*nonsense"):
        instantiate(OmegaConf.select(config, node))


def test_instantiate_changes_nothing():
    config = composed("stage=ppo", "seed=3")
    before = OmegaConf.to_yaml(config)
    preflight(config)
    assert OmegaConf.to_yaml(config) == before


def test_source_key_follows_references_through_nodes():
    config = OmegaConf.create({"a": {"x": "${b}"}, "b": {"y": "${c}"}, "c": 1, "d": "${a.x}"})
    assert source_key(config, "d.y") == "c"
    assert source_key(config.a, "a.x.y") == "c"
    assert source_key(config, "c") == "c"


@pytest.mark.parametrize("value", ["plain", "a=b,c", "it's", "two words", "/tmp/x=1,y=2/model"])
def test_with_value_quotes_anything(value):
    assert isinstance(config := compose([with_value("model.path", value)]), DictConfig)
    assert config.model.path == value


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("data.path=数据/影评.jsonl", "数据/影评.jsonl"),
        ("name=测试 运行", "测试 运行"),
        ("name='已有引号'", "已有引号"),
        ("data.columns.prompt=Füße", "Füße"),
    ],
)
def test_values_in_any_script_need_no_quotes(typed: str, read: str) -> None:
    """Hydra's own grammar knows letters of ASCII alone outside of quotes."""
    config = compose(
        [typed, "stage=sft", "experiment=none", "data=custom", "model.path=x", *REST_OF[typed.split("=")[0]]]
    )
    assert OmegaConf.select(config, typed.split("=")[0]) == read


REST_OF = {
    "data.path": ["data.columns.prompt=q"],
    "name": ["data.path=x.jsonl", "data.columns.prompt=q"],
    "data.columns.prompt": ["data.path=x.jsonl"],
}


def test_what_is_given_again_is_said() -> None:
    given = ["experiment=quick", "ppo.lr=1", "experiment=none", "ppo.lr=1", "seed=2"]
    assert repeated(given) == ["experiment=quick counts for nothing, as experiment=none comes after it"]
