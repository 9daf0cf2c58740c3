"""Every architecture that `model=` offers: positions, masks, padding, cache and adapters are right for each."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from src.config.compose import compose
from src.config.files import CONF
from src.core.padding import pad_left
from src.models.forward import next_token_logprobs
from src.models.loading import load_causal_lm, load_tokenizer, unmatched_targets
from src.models.roles import LoraRoles, build_roles
from src.models.settings import LoraSettings
from src.rollout import sampling
from src.rollout.replay import replayable
from src.rollout.sampling import Sampler
from src.stages.objects import instantiate
from tests.families import CLASSES, TEXTS, config_of, tokenizer_of, write_family
from tests.tiny import FOREIGN_WARNINGS, assert_rows_close, model_settings, plain_logprobs, ragged_rollout, rows_of

pytestmark = FOREIGN_WARNINGS
FAMILIES = sorted(CLASSES)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model of the family."""
    return write_family(tmp_path_factory.mktemp("family"), request.param)


def test_every_model_that_is_offered_from_the_hub_is_tried_here() -> None:
    options = {path.stem for path in (CONF / "model").glob("*.yaml")} - {"base"}
    assert {option for option in options if compose([f"model={option}"]).model.path is not None} == set(FAMILIES)


def test_a_padded_batch_gives_the_logprobs_of_single_rows(folder: str) -> None:
    """Checklist 2, 3. Reference: each row alone, unpadded, through the model's own forward."""
    roles = build_roles(model_settings(folder), load_tokenizer(folder), seed=1, critic=True)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    rollout = ragged_rollout()
    logprobs = roles.distribution(rollout, 1.0).logprobs()
    assert_rows_close(rows_of(logprobs, rollout.response_mask), plain_logprobs(plain, rollout), 1e-5)


def test_texts_padded_on_the_left_give_the_logprobs_of_single_texts(folder: str) -> None:
    """Checklist 2, 3."""
    lm, tokenizer = load_causal_lm(model_settings(folder)), load_tokenizer(folder)
    rows = tokenizer(TEXTS)["input_ids"]
    assert len({len(row) for row in rows}) > 1
    with torch.no_grad():
        batch = next_token_logprobs(lm, *pad_left(rows, tokenizer.pad_token_id))
        single = torch.cat([next_token_logprobs(lm, *pad_left([row], tokenizer.pad_token_id)) for row in rows])
    assert_close(batch, single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [None, 2])
def test_the_cache_of_the_rollout_gives_the_logprobs_of_whole_forwards(
    folder: str, steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checklist 2, 58. Ragged prompts, padded on the left, token by token with a key-value cache; and as on a GPU."""
    if steps is not None:
        monkeypatch.setattr(sampling, "STEPS", steps)
        monkeypatch.setattr(sampling, "replayable", lambda lm, cache, _: replayable(lm, cache, torch.device("cuda")))
    lm, tokenizer = load_causal_lm(model_settings(folder)), load_tokenizer(folder)
    prompts = tokenizer([text[: 10 + 9 * i] for i, text in enumerate(TEXTS)])["input_ids"]
    ids, mask = pad_left(prompts, tokenizer.pad_token_id)
    stop = torch.tensor([tokenizer.eos_token_id])
    drawn = Sampler(max_new_tokens=6, temperature=1.0).sample(
        lm, ids, mask, stop, tokenizer.pad_token_id, torch.Generator().manual_seed(0)
    )
    for prompt, response, counted, logprobs in zip(prompts, *drawn[:3], strict=True):
        whole = torch.tensor([[*prompt, *response[counted].tolist()]])
        with torch.no_grad():
            expected = lm(input_ids=whole).logits[0].log_softmax(-1)[:-1].gather(1, whole[0, 1:, None]).squeeze(1)
        assert_close(logprobs[counted], expected[len(prompt) - 1 :], atol=1e-5, rtol=0)


def test_all_linear_takes_every_linear_layer_but_the_vocabulary_head(folder: str) -> None:
    lora = LoraSettings(rank=2, alpha=4, dropout=0.0, targets="all-linear")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    head = plain.get_output_embeddings()
    linear = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    roles = build_roles(model_settings(folder, lora), load_tokenizer(folder), seed=1, critic=False)
    assert isinstance(roles, LoraRoles)
    adapted = {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name, _ in roles.peft.named_parameters()
        if ".lora_A." in name
    }
    assert adapted == linear


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_looked_up_in_the_architecture(family: str) -> None:
    config = config_of(family, tokenizer_of(family))
    own = {"gpt2": "c_attn", "pythia-160m": "query_key_value"}.get(family, "q_proj")
    assert unmatched_targets(config, [own, "absent"]) == ["absent"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_with_dots_and_hyphens_is_an_option(family: str) -> None:
    run = compose([f"model={family}"])
    assert run.choices["model"] == family
    settings = instantiate(run.model, "model")
    assert (settings.name, settings.path) == (family, run.model.path)


def test_the_schema_is_no_option_to_choose_from() -> None:
    with pytest.raises(ValueError, match="the options are digits, gpt2, llama"):
        compose(["model=nope"])
