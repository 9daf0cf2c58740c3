"""What the reward model may be: every choice, in several architectures, trained, saved and read by libraries alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from src.errors import ModelError
from src.models.loading import load_tokenizer
from src.models.reward_choices import Pretrained, SharedBaseAdapter
from src.models.reward_net import RewardNet
from src.models.scalar_head import BIAS_KEY
from src.models.settings import LoraSettings
from src.rewards.learned import LearnedReward
from tests.models.architectures import ALL, DECODERS, ENCODERS, write
from tests.tiny import EOS, FOREIGN_WARNINGS, LORA, TinyCorpus, model_settings, snapshot

pytestmark = FOREIGN_WARNINGS
ROWS = [[4, 5, 6, 7, EOS], [8, EOS], [9, 10, 11, EOS]]
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification
merged, base, adapter, rows = *sys.argv[1:4], json.loads(sys.argv[4])
def scores(model):
    with torch.no_grad():
        return [model.eval()(input_ids=torch.tensor([row])).logits.item() for row in rows]
found = [scores(AutoModelForSequenceClassification.from_pretrained(merged))]
assert not any(name == "src" or name.startswith(("src.", "peft")) for name in sys.modules)
from peft import PeftModel
classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
found.append(scores(PeftModel.from_pretrained(classifier, adapter)))
print(json.dumps(found))
"""


def in_a_fresh_process(merged: str, base: str, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of `ROWS`, one at a time: of the merged model by transformers alone, of adapter and base with peft."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PLAIN, merged, base, adapter, json.dumps(ROWS)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    of_merged, by_peft = json.loads(done.stdout)
    return torch.tensor(of_merged), torch.tensor(by_peft)


def scores(net: RewardNet) -> torch.Tensor:
    return torch.cat([net.scores(torch.tensor([row]), torch.ones(1, len(row)).bool()) for row in ROWS])


def step(net: RewardNet) -> None:
    """One step of gradient descent on a difference of scores, large enough to see."""
    trained = [p for p in net.parameters() if p.requires_grad]
    for _ in range(2):  # in the first one a fresh LoRA B is 0 and passes nothing on to A
        net.zero_grad()
        (scores(net)[0] - scores(net)[1]).backward()
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:
                    parameter += 0.05 * parameter.grad / (1e-3 + parameter.grad.abs().max())


def on_base(path: str, seed: int = 1, with_lm_head: bool = False) -> RewardNet:
    choice = SharedBaseAdapter(model_settings(path), LORA)
    return choice.build(choice.build_tokenizer(TinyCorpus()), seed, with_lm_head)


@pytest.mark.parametrize("name", DECODERS)
def test_an_adapter_leaves_its_base_and_merges_to_the_same_scores(name: str, tmp_path: Path) -> None:
    """Checklist 25, 59, 65. Only adapter and head are trained; `model/` scores as the adapter did before."""
    path = write(tmp_path / "base", name)
    net = on_base(path)
    frozen = {key: p.detach().clone() for key, p in net.named_parameters() if not p.requires_grad}
    trained = [key for key, p in net.named_parameters() if p.requires_grad]
    assert all("lora_" in key or ".score.modules_to_save." in key for key in trained)
    before = scores(net).detach()
    step(net)
    assert all(torch.equal(p, frozen[key]) for key, p in net.named_parameters() if key in frozen)
    net.normalize(0.3, 1.7)
    mine = scores(net).detach()
    assert (mine - before).abs().max() > 1e-3
    folder = net.save(tmp_path / "run", load_tokenizer(path))
    merged = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        plain = torch.cat([merged(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
    assert_close(plain + getattr(merged.config, BIAS_KEY, 0.0), mine, atol=1e-6, rtol=1e-6)
    lm = AutoModelForCausalLM.from_pretrained(path)
    for key, tensor in lm.base_model.state_dict().items():
        found = {k.replace(".base_layer", ""): v for k, v in net.model.base_model.state_dict().items()}
        assert torch.equal(found[key], tensor)


def test_folders_score_the_same_in_a_process_without_this_project(tmp_path: Path) -> None:
    """Checklist 25, 65. `model/` with transformers alone; `adapter/` with peft, up to the constant beside it."""
    path = write(tmp_path / "base", "gpt2")
    net = on_base(path)
    step(net)
    net.normalize(0.3, 1.7)
    mine = scores(net).detach()
    net.save(tmp_path / "run", load_tokenizer(path))
    of_merged, by_peft = in_a_fresh_process(str(tmp_path / "run/model"), path, str(tmp_path / "run/adapter"))
    assert_close(of_merged, mine, atol=1e-6, rtol=0)
    bias = json.loads((tmp_path / "run/adapter/reward.json").read_text())["bias"]
    assert bias == pytest.approx(-0.3 / 1.7)
    assert_close(by_peft + bias, mine, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ALL)
def test_a_pretrained_model_of_any_architecture_learns_and_loads(
    name: str, lora: LoraSettings | None, tmp_path: Path
) -> None:
    """Checklist 25. A fresh head here, a step that moves scores, and the same scores from the folder."""
    path = write(tmp_path / "base", name)
    choice = Pretrained(path, lora, chat_template=False)
    tokenizer = choice.build_tokenizer(TinyCorpus())
    net = choice.build(tokenizer, 1, with_lm_head=False)
    before = scores(net).detach()
    step(net)
    net.normalize(-0.2, 0.6)
    mine = scores(net).detach()
    assert (0.6 * mine - 0.2 - before).abs().max() > 1e-3
    folder = net.save(tmp_path / "run", tokenizer)
    reward = LearnedReward(str(folder), 2).load()
    loaded = torch.cat([reward.model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
    assert_close(loaded + getattr(reward.model.config, BIAS_KEY, 0.0), mine, atol=2e-6, rtol=1e-6)


def test_a_classifier_keeps_its_trained_head(tmp_path: Path) -> None:
    """A reward model can be trained on; the seed decides a fresh head only."""
    first = Pretrained(write(tmp_path / "base", "llama"), None, False)
    tokenizer = first.build_tokenizer(TinyCorpus())
    net = first.build(tokenizer, 1, False)
    net.normalize(0.4, 2.0)
    expected = scores(net)
    net.save(tmp_path / "run", tokenizer)
    again = Pretrained(str(tmp_path / "run/model"), None, False).build(tokenizer, 2, False)
    assert_close(scores(again), expected, atol=1e-6, rtol=0)  # the bias, which Llama keeps beside its weights, too
    again.normalize(0.1, 0.5)
    again.save(tmp_path / "again", tokenizer)
    reward = LearnedReward(str(tmp_path / "again"), 2).load()
    found = reward.score([""], ["the film"], [{}])
    ids = torch.tensor([[*tokenizer("the film")["input_ids"], EOS]])
    assert_close(found, again.scores(ids, torch.ones_like(ids).bool()))  # saving changes nothing for those who go on
    assert reward.model.config.score_bias == pytest.approx((-0.4 / 2.0 - 0.1) / 0.5)
    assert not torch.equal(scores(first.build(tokenizer, 2, False)), scores(net))


def test_the_same_seed_gives_the_same_adapter(tmp_path: Path) -> None:
    path = write(tmp_path, "gpt2")
    one, two, other = on_base(path), on_base(path), on_base(path, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(list(one.parameters())), two.parameters(), strict=True))
    assert not torch.equal(scores(one), scores(other))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["adapter", "full", "lora"])
def test_the_vocabulary_head_is_the_language_models(kind: str, name: str, tmp_path: Path) -> None:
    """With fresh adapters the chosen response has the logprobs of the model in the folder; scores are as without."""
    path = write(tmp_path, name)
    choice = (
        SharedBaseAdapter(model_settings(path), LORA)
        if kind == "adapter"
        else Pretrained(path, LORA if kind == "lora" else None, False)
    )
    assert choice.has_lm_head()
    net = choice.build(choice.build_tokenizer(TinyCorpus()), 1, True)
    ids, mask = torch.tensor([ROWS[0], ROWS[0][::-1]]), torch.ones(2, 5).bool()
    response = torch.tensor([[False, False, True, True, True]])
    both, logprobs = net.scores_and_logprobs(ids, mask, response)
    assert_close(both, net.scores(ids, mask))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=ids[:1]).logits[0]
    expected = torch.stack([logits[t - 1].log_softmax(0)[ROWS[0][t]] for t in (2, 3, 4)])
    assert_close(logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_no_vocabulary_head(name: str, tmp_path: Path) -> None:
    """Nor has a decoder that was saved as a classifier."""
    path = write(tmp_path / "encoder", name)
    assert not Pretrained(path, None, False).has_lm_head()
    decoder = Pretrained(write(tmp_path / "base", "gpt2"), None, False)
    tokenizer = decoder.build_tokenizer(TinyCorpus())
    decoder.build(tokenizer, 1, False).save(tmp_path / "run", tokenizer)
    assert not Pretrained(str(tmp_path / "run/model"), None, False).has_lm_head()


def test_a_chat_template_that_is_not_there_is_named(tmp_path: Path) -> None:
    """And one that is there is written down for whoever scores with the model."""
    path = write(tmp_path / "base", "gpt2")
    choice = Pretrained(path, None, chat_template=True)
    with pytest.raises(ModelError, match=r"reward_model\.net\.chat_template=true: there is no chat template at"):
        choice.build_tokenizer(TinyCorpus())
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = "{% for m in messages %}{{ ' ' + m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    net = choice.build(choice.build_tokenizer(TinyCorpus()), 1, False)
    net.save(tmp_path / "run", tokenizer)
    reward = LearnedReward(str(tmp_path / "run/model"), 2).load()
    chats = reward.score(["film", "cast"], ["great .", "bad"], [{}] * 2)
    plain = Pretrained(path, None, False).build(tokenizer, 1, False)
    plain.classifier.load_state_dict(net.classifier.state_dict())
    plain.save(tmp_path / "plain", tokenizer)
    texts = LearnedReward(str(tmp_path / "plain/model"), 2).load()
    assert_close(chats, texts.score([" film", " cast"], [" great .", " bad"], [{}] * 2))
    assert (chats - texts.score(["film", "cast"], ["great .", "bad"], [{}] * 2)).abs().max() > 1e-3


def test_a_target_that_matches_no_layer_is_named(tmp_path: Path) -> None:
    lora = LoraSettings(2, 2, 0.0, ["nowhere"])
    choice = SharedBaseAdapter(model_settings(write(tmp_path, "gpt2")), lora)
    with pytest.raises(ModelError, match=r"reward_model\.net\.lora\.targets=\['nowhere'\] does not fit"):
        choice.build(choice.build_tokenizer(TinyCorpus()), 1, False)


def test_where_padding_is_the_end_token_plain_transformers_still_reads_the_end(tmp_path: Path) -> None:
    """Checklist 9. It looks for the last token that is no padding; with pad = end it would read one token earlier."""
    path = write(tmp_path / "base", "llama")
    tokenizer = load_tokenizer(path)
    tokenizer.pad_token = tokenizer.eos_token
    net = on_base(path)
    mine = scores(net).detach()
    model = AutoModelForSequenceClassification.from_pretrained(net.save(tmp_path / "run", tokenizer)).eval()
    with torch.no_grad():
        assert_close(
            torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS]), mine, atol=1e-6, rtol=0
        )
