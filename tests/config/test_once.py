"""`python -m src.train experiment=quick` composes and checks each stage once, and makes one object of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
import pytest

from src.config.schema import Node
from src.core.estimators import GAE
from src.core.kl import SampledKL
from src.core.policy_losses import ClippedSurrogate
from src.core.value_losses import ClippedSquaredError
from src.data.embedded.reviews import Reviews
from src.models.settings import ModelSettings
from src.modules.settings import PPOSettings
from src.rewards.learned import LearnedReward
from src.rollout.experience import ExperienceMaker
from src.rollout.kl_controller import FixedKL
from src.rollout.sampling import Sampler
from src.rollout.scoring import Scorer
from src.rollout.shaping import ScoreShaping
from src.runs import start
from src.stages.base import Stage
from tests.tiny import FOREIGN_WARNINGS

pytestmark = FOREIGN_WARNINGS

IN_PPO = (
    *(ExperienceMaker, PPOSettings, Scorer, ScoreShaping, GAE, ClippedSurrogate, ClippedSquaredError, LearnedReward),
)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a configuration was composed and validated, and objects were made; by stage where one is being made."""
    found: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(hydra, "compose", counted("composed", hydra.compose))
    validate = Node.model_validate.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Node, "model_validate", classmethod(counted("validated", validate)))
    for kind in (*IN_PPO, Sampler, FixedKL, SampledKL, ModelSettings, Reviews, Stage):
        monkeypatch.setattr(kind, "__init__", counted(kind.__name__, kind.__init__))
    return found


def test_each_stage_is_composed_and_validated_once_and_makes_its_objects_once(
    counts: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All but the training itself, of the run and of the two models that it needs."""
    trained: dict[str, Counter[str]] = {}
    before: Counter[str] = Counter()

    def only_make(stage: Stage[Any], folder: Path, held: ExitStack) -> dict[str, Any]:
        folder.mkdir(parents=True)
        stage.trainer(stage.callbacks(folder), folder)
        module, _ = stage.build(stage.corpus(), folder)
        if stage.run.stage != "ppo":
            module.save(folder)
        (folder / "result.json").write_text("{}")
        trained[stage.run.stage] = counts - before
        before.update(trained[stage.run.stage])
        return {}

    monkeypatch.setattr(start, "_train", only_make)
    start.start(["experiment=quick", f"log_dir={tmp_path}", "data.n_reviews=240", "data.n_pairs=20"])
    assert list(trained) == ["sft", "reward", "ppo"]
    assert counts["composed"] == counts["validated"] == len(trained)
    assert counts["Stage"] == counts["Reviews"] == len(trained)
    assert {kind.__name__: counts[kind.__name__] for kind in IN_PPO} == {kind.__name__: 1 for kind in IN_PPO}
    assert counts["Sampler"] == 2  # of the rollout, and of the samples that normalize the reward model's scores
    assert counts["SampledKL"] == 2  # to the reference, and to the old policy
    assert counts["FixedKL"] == 2  # its controllers
