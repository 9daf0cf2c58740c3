"""What a run folder may make in other commands: the white list, and more only by consent of the command line."""

from __future__ import annotations

import pytest

from src.config.compose import compose, restored
from src.errors import ConfigError
from src.runs.trust import refuse_unknown, targets_in, white_list, without_consent

REMOTE = "model.trust_remote_code=true"


def test_the_white_list_is_this_project_s_own_objects_and_one_of_transformers() -> None:
    foreign = {target for target in white_list() if not target.startswith("src.")}
    assert foreign == {"transformers.GPT2Config"}
    assert {"src.rewards.vader.Vader", "src.core.estimators.GAE"} <= white_list()
    assert "src.rewards.http.HttpReward" not in white_list()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_of_this_project_s_objects_needs_no_consent(stage: str) -> None:
    refuse_unknown(compose([f"stage={stage}"]), "RUN", [])


FOREIGN = {
    "a library": {"_target_": "pandas.read_pickle", "filepath_or_buffer": "x"},
    "through a module of this project": {"_target_": "src.train.os.system", "command": "id"},
    "a function of this project": {"_target_": "src.runs.start.start", "overrides": []},
    "in a mapping": {"_target_": "src.rewards.mix.MixReward", "parts": {"a": {"_target_": "os.system"}}, "weights": {}},
    "in a list": {"_target_": "src.rewards.mix.MixReward", "parts": [[{"_target_": "os.system"}]], "weights": {}},
    "behind a whole object": {"_target_": "src.rewards.vader.Vader", "x": {"_target_": "os.system", "_partial_": True}},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_any_other_target_is_refused_by_its_place(name: str) -> None:
    content = compose(["stage=ppo"]).plain()
    content["choices"]["reward"] = "own"
    run = restored(content | {"reward": FOREIGN[name]})  # as a folder's config.yaml is read
    *_, (place, target) = targets_in(FOREIGN[name])
    expected = rf"^RUN: its configuration names reward\.{place}={target}, which does not belong to this project: add"
    with pytest.raises(ConfigError, match=expected):
        refuse_unknown(run, "RUN", ["ppo.clip=0.1", "prompts=p.txt"])
    refuse_unknown(run, "RUN", ["reward=function", f"reward.target={target}"])  # named by this call


@pytest.mark.parametrize("target", ["src.loggers.mlflow.MlflowRun", "src.loggers.csv.CsvTables"])
def test_a_logger_in_the_place_of_a_reward_is_refused(target: str) -> None:
    """It is on the white list for its own place, where no other command makes it."""
    assert target in white_list()
    content = compose(["stage=ppo"]).plain()
    content["choices"]["reward"] = "own"
    step = {"_target_": "src.rewards.steps.StepReward", "step": {"_target_": target, "save_dir": "x"}}
    with pytest.raises(ConfigError, match=rf"names reward\.step\._target_={target}"):
        refuse_unknown(restored(content | {"reward": step}), "RUN", [])
    refuse_unknown(compose(["stage=ppo", "early_stop=gold", "gold_reward=vader"]), "RUN", [])


def test_a_reward_that_asks_another_machine_needs_consent() -> None:
    """It would get the prompts, and what any environment variable holds as its token."""
    run = compose(["stage=ppo", "reward=http", "reward.url=http://elsewhere", "reward.token_variable=AWS_SECRET"])
    with pytest.raises(ConfigError, match=r"HttpReward, which asks another machine: .*, or choose another, as reward="):
        refuse_unknown(run, "RUN", [])
    refuse_unknown(run, "RUN", ["reward=http", "reward.url=http://mine"])


def test_a_folder_gives_no_consent_itself() -> None:
    """Of trust_remote_code only this call's command line counts; callbacks and loggers are left out in any case."""
    run = compose(["stage=ppo", REMOTE, "+callbacks.z._target_=os.mkdir", "ppo.clip=0.1", "logger=wandb"])
    for arguments, trusted, expected in (
        ([], False, False), ([REMOTE], False, True), ([], True, True),
    ):  # fmt: skip
        left = without_consent(run, arguments, trusted)
        assert left.model.trust_remote_code is expected
        assert (REMOTE in left.overrides) is trusted
        assert [o for o in left.overrides if o != REMOTE] == ["stage=ppo", "ppo.clip=0.1"]
        assert set(left.callbacks.model_dump()) == {"checkpoint", "stop"}
        assert left.logger.model_dump() == {}
    assert without_consent(compose(["stage=ppo"]), [], True).model.trust_remote_code is False
