"""The reward stage: its loss, its test figures, and a folder that loads with the same scores."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForSequenceClassification, get_constant_schedule

from src.core.diagnostics import calibration_error
from src.data.modules import PairData
from src.models.reward_choices import FromScratch, Pretrained, SharedBaseAdapter
from src.modules.reward import RewardModule
from src.rewards.learned import LearnedReward
from src.types import PreferencePair
from tests.tiny import (
    EOS,
    FOREIGN_WARNINGS,
    LORA,
    Recorder,
    TinyCorpus,
    gpt2_config,
    model_settings,
    tokenizer,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

PAIRS = [
    PreferencePair(prompt="the film", chosen=" was great .", rejected=" was bad .", gap=0.1),
    PreferencePair(prompt="a", chosen=" great cast .", rejected=" dull end , we did not .", gap=0.3),
    PreferencePair(prompt="they loved", chosen=" the plot .", rejected=".", gap=0.8),
    PreferencePair(prompt="we liked", chosen=" the cast and the end .", rejected=" a bad film .", gap=None),
    PreferencePair(prompt="the plot", chosen=" was bright .", rejected=" was long and dull .", gap=1.4),
    PreferencePair(prompt="great", chosen=" .", rejected=" a bad film , a bad cast .", gap=0.5),
]


class Pairs(TinyCorpus):
    """The pairs above in every split."""

    def pairs(self, split: str) -> list[PreferencePair]:
        return PAIRS


def make(**config: Any) -> RewardModule:
    def config_of(**ids: Any) -> Any:
        return gpt2_config(**(ids | config))

    return RewardModule(
        FromScratch(config_of, lambda texts: tokenizer()), tokenizer(), min_gap=0.5, gap_edges=[0.0, 0.5, 1.0],
        margin_coef=0.0, center_coef=0.0, lm_coef=0.0,
        optimizer=partial(torch.optim.SGD, lr=0.0), lr_schedule=get_constant_schedule, max_grad_norm=1.0, seed=1,
    )  # fmt: skip


def trainer(tmp_path: Path, recorder: Recorder, **options: Any) -> Trainer:
    return Trainer(
        **({"devices": 1} | options), accelerator="cpu", max_epochs=1, log_every_n_steps=1, num_sanity_val_steps=0,
        logger=[recorder], enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip


def data(batch_size: int, lm_coef: float = 0.0) -> PairData:
    return PairData(
        Pairs(),
        tokenizer(),
        chat_template=False,
        lm_coef=lm_coef,
        batch_size=batch_size,
        steps=1,
        max_tokens=40,
        seed=1,
    )


def plain_differences(module: RewardModule) -> list[float]:
    """r(chosen) - r(rejected) of each pair, every text alone and unpadded."""

    def score(text: str) -> float:
        ids = torch.tensor([[*tokenizer()(text)["input_ids"], EOS]])
        with torch.no_grad():
            return module.net.classifier(input_ids=ids).logits[0, 0].item()

    module.eval()
    return [score(p.prompt + p.chosen) - score(p.prompt + p.rejected) for p in PAIRS]


def test_the_loss_is_minus_log_sigmoid_of_the_difference(tmp_path: Path) -> None:
    """Checklist 26, 27. One batch that holds each pair once, in any order."""
    module, recorder = make(), Recorder()
    differences = plain_differences(module)
    assert 0 < sum(d > 0 for d in differences) < 6
    module.train()
    trainer(tmp_path, recorder).fit(module, datamodule=data(6))
    logged = recorder.by_step()
    loss = sum(math.log1p(math.exp(-d)) for d in differences) / 6
    assert logged[1]["reward/loss"] == pytest.approx(loss, abs=1e-5)
    assert logged[1]["reward/accuracy"] == pytest.approx(sum(d > 0 for d in differences) / 6)
    assert {k: v for row in logged.values() for k, v in row.items()}["reward/val_loss"] == pytest.approx(loss, abs=1e-5)


def test_the_test_figures_are_accuracies_by_gap(tmp_path: Path) -> None:
    """Checklist 27. `accuracy` leaves out pairs nearer than min_gap, but not those of unknown gap."""
    module = make()
    right = [d > 0 for d in plain_differences(module)]
    trainer(tmp_path, Recorder()).test(module, datamodule=data(4), verbose=False)
    figures = module.result()["reward_model"]

    def share(rows: list[int]) -> tuple[float, int]:
        return pytest.approx(sum(right[i] for i in rows) / len(rows)), len(rows)

    assert (figures["accuracy"].value, figures["accuracy"].n) == share([2, 3, 4, 5])
    assert (figures["accuracy_all_pairs"].value, figures["accuracy_all_pairs"].n) == share(list(range(6)))
    by_gap = {name: (f.value, f.n) for name, f in figures.items() if "gap" in name}
    assert by_gap == {
        "accuracy_gap_0_to_0.5": share([0, 1]),
        "accuracy_gap_0.5_to_1": share([2, 5]),
        "accuracy_gap_1_to_inf": share([4]),
    }


def test_margin_and_centering_are_part_of_what_is_minimized(tmp_path: Path) -> None:
    """One step of SGD with learning rate 1 is the gradient of the plain loss; a pair of unknown gap has no margin."""
    module = make()
    module.margin_coef, module.center_coef, module.max_grad_norm = 0.8, 0.1, 1e9
    module.eval()  # no dropout anyway
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    total = torch.zeros(())
    for pair in PAIRS:
        scores = [
            module.net.classifier(
                input_ids=torch.tensor([[*tokenizer()(pair.prompt + side)["input_ids"], EOS]])
            ).logits[0, 0]
            for side in (pair.chosen, pair.rejected)
        ]
        difference = scores[0] - scores[1] - 0.8 * (pair.gap or 0.0)
        total = total + torch.log1p(torch.exp(-difference)) + 0.1 * (scores[0] + scores[1]) ** 2
    expected = torch.autograd.grad(total / 6, list(module.net.parameters()), materialize_grads=True)
    module.make_optimizer = partial(torch.optim.SGD, lr=1.0)
    trainer(tmp_path, Recorder()).fit(module, datamodule=data(6))
    for (name, parameter), gradient in zip(module.net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(before[name] - parameter.detach(), gradient, atol=1e-5, rtol=1e-4)


def test_the_length_is_correlated_with_the_score(tmp_path: Path) -> None:
    """Over all twelve texts, by numpy; and the calibration error is that of the margins."""
    module = make()
    texts = [pair.prompt + side for pair in PAIRS for side in (pair.chosen, pair.rejected)]
    rows = [torch.tensor([[*tokenizer()(text)["input_ids"], EOS]]) for text in texts]
    module.eval()
    with torch.no_grad():
        scores = [module.net.classifier(input_ids=row).logits[0, 0].item() for row in rows]
    trainer(tmp_path, Recorder()).test(module, datamodule=data(4), verbose=False)
    figures = module.result()["reward_model"]
    expected = np.corrcoef(scores, [row.shape[1] for row in rows])[0, 1]
    assert figures["length_correlation"].value == pytest.approx(expected, abs=1e-4)
    margins = torch.tensor([a - b for a, b in zip(scores[::2], scores[1::2], strict=True)], dtype=torch.float64)
    assert figures["calibration_error"].value == pytest.approx(calibration_error(margins).item(), abs=1e-4)


def test_the_folder_gives_the_same_scores_in_plain_transformers_and_as_a_reward(tmp_path: Path) -> None:
    """Checklist 25."""
    module = make()
    differences = plain_differences(module)
    folder = module.save(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.num_labels == 1
    reward = LearnedReward(str(folder), 4).load()
    metadata: list[dict[str, Any]] = [{}] * 6
    chosen = reward.score([p.prompt for p in PAIRS], [p.chosen for p in PAIRS], metadata)
    rejected = reward.score([p.prompt for p in PAIRS], [p.rejected for p in PAIRS], metadata)
    assert (chosen - rejected).tolist() == pytest.approx(differences, abs=1e-5)


def test_the_same_seed_gives_the_same_fresh_model() -> None:
    torch.manual_seed(0)
    one = make()
    torch.manual_seed(1)
    two = make()
    assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_the_language_model_loss_is_that_of_the_chosen_responses(kind: str, tmp_path: Path) -> None:
    """One step of SGD with learning rate 1 is the gradient of both losses, each text alone; both are logged apart."""
    path = write_lm(tmp_path / "base")
    choice = SharedBaseAdapter(model_settings(path), LORA) if kind == "adapter" else Pretrained(path, None, False)
    module = RewardModule(
        choice, tokenizer(), min_gap=0.5, gap_edges=[], margin_coef=0.0, center_coef=0.0, lm_coef=0.3,
        optimizer=partial(torch.optim.SGD, lr=1.0), lr_schedule=get_constant_schedule, max_grad_norm=1e9, seed=1,
    )  # fmt: skip
    net, head = module.net.model, module.net.lm_head
    before = {name: p.detach().clone() for name, p in module.net.named_parameters() if p.requires_grad}
    ranking, nats = torch.zeros(()), []
    for pair in PAIRS:
        prompt, sides = tokenizer()(pair.prompt)["input_ids"], []
        for text in (pair.chosen, pair.rejected):
            sides.append(torch.tensor([[*tokenizer()(pair.prompt + text)["input_ids"], EOS]]))
        scores = [net(input_ids=ids).logits[0, 0] for ids in sides]
        ranking = ranking + torch.log1p(torch.exp(scores[1] - scores[0]))
        logits = head(net.base_model(input_ids=sides[0]).last_hidden_state[0])
        nats += [-logits[t - 1].log_softmax(0)[sides[0][0, t]] for t in range(len(prompt), sides[0].shape[1])]
    lm_loss = torch.stack(nats).mean()
    parameters = [p for p in module.net.parameters() if p.requires_grad]
    expected = torch.autograd.grad(ranking / 6 + 0.3 * lm_loss, parameters, materialize_grads=True)
    recorder = Recorder()
    trainer(tmp_path, recorder).fit(module, datamodule=data(6, lm_coef=0.3))
    logged = recorder.by_step()[1]
    assert logged["reward/lm_loss"] == pytest.approx(lm_loss.item(), abs=1e-5)
    assert logged["reward/loss"] == pytest.approx(ranking.item() / 6, abs=1e-5)
    for (name, old), new, gradient in zip(before.items(), parameters, expected, strict=True):
        torch.testing.assert_close(old - new.detach(), gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_margins_are_on_the_scale_of_the_loss_whatever_the_gain(tmp_path: Path) -> None:
    """Checklist 24. sigmoid(margin) is the probability that was learned, also after gain and bias were set."""
    module = make()
    trainer(tmp_path, Recorder()).test(module, datamodule=data(4), verbose=False)
    before = torch.cat(module.margins)
    module.margins.clear()
    module.net.normalize(0.7, 3.0)
    trainer(tmp_path, Recorder()).test(module, datamodule=data(4), verbose=False)
    torch.testing.assert_close(torch.cat(module.margins), before, atol=1e-5, rtol=1e-5)
