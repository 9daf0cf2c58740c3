"""The sampler against transformers' own generate, and against the distribution it claims to draw from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from src.errors import SettingError
from src.rollout.drawing import BLOCK, inverse_cdf
from src.rollout.sampling import Sampler
from src.utils.distributed import RowShard
from tests.tiny import EOS, PAD, PROMPTS, make_prompts, write_lm

STOP = torch.tensor([EOS])


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A model that often ends: the end token's own embedding is scaled up."""
    model = AutoModelForCausalLM.from_pretrained(write_lm(tmp_path_factory.mktemp("lm"))).eval()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2
    return model


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(
    lm: PreTrainedModel, tokens: int, generator: torch.Generator | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prompts = make_prompts(PROMPTS)
    return Sampler(tokens, temperature).sample(lm, prompts.ids, prompts.mask, STOP, PAD, generator)


def test_greedy_tokens_are_those_of_generate(lm: PreTrainedModel) -> None:
    """Checklist 2, 7. On ragged prompts padded on the left."""
    prompts = make_prompts(PROMPTS)
    ids, _mask, _, finished = sample(lm, 10, None)
    with torch.no_grad():
        expected = lm.generate(
            prompts.ids, attention_mask=prompts.mask.long(), do_sample=False, max_new_tokens=10, pad_token_id=PAD,
            eos_token_id=EOS,
        )[:, prompts.ids.shape[1] :]  # fmt: skip
    assert torch.equal(ids, expected)
    assert finished.tolist() == [EOS in row for row in expected.tolist()]
    assert finished.any()
    assert not finished.all()  # both kinds of ends are among them


def test_greedy_tokens_of_a_row_do_not_depend_on_the_others(lm: PreTrainedModel) -> None:
    """Checklist 2, 3."""
    ids, mask, logprobs, _ = sample(lm, 8, None)
    for row, text in enumerate(PROMPTS):
        alone = make_prompts([text])
        one_ids, one_mask, one_logprobs, _ = Sampler(8, 1.0).sample(lm, alone.ids, alone.mask, STOP, PAD, None)
        assert ids[row][mask[row]].tolist() == one_ids[one_mask].tolist()
        assert_close(logprobs[row][mask[row]], one_logprobs[one_mask], atol=1e-5, rtol=0)


def test_responses_stop_at_the_first_stop_token_and_are_padded_after_it(lm: PreTrainedModel) -> None:
    """Checklist 7, 8, 10."""
    ids, mask, logprobs, finished = sample(lm, 12, draws(3))
    assert finished.any()
    assert not finished.all()
    for row in range(len(ids)):
        tokens = ids[row].tolist()
        length = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
        assert mask[row].tolist() == [t < length for t in range(len(tokens))]
        assert tokens[length:] == [PAD] * (len(tokens) - length)
        assert bool(finished[row]) == (EOS in tokens)
    assert not logprobs[~mask].any()
    assert (logprobs[mask] < 0).all()


def test_a_padding_id_equal_to_the_end_token_does_no_harm(lm: PreTrainedModel) -> None:
    """Checklist 9."""
    prompts = make_prompts(PROMPTS)
    apart = Sampler(12, 1.0).sample(lm, prompts.ids, prompts.mask, STOP, PAD, draws(3))
    same = Sampler(12, 1.0).sample(lm, prompts.ids, prompts.mask, STOP, EOS, draws(3))
    assert torch.equal(apart[0][apart[1]], same[0][same[1]])
    for index in (1, 3):
        assert torch.equal(apart[index], same[index])


def test_several_stop_tokens_stop_alike(lm: PreTrainedModel) -> None:
    """Checklist 10."""
    prompts = make_prompts(PROMPTS)
    stops = torch.tensor([EOS, 5, 9, 11])
    ids, mask, _, finished = Sampler(12, 1.0).sample(lm, prompts.ids, prompts.mask, stops, PAD, draws(1))
    last = [row[m].tolist()[-1] for row, m in zip(ids, mask, strict=True)]
    inner = [t for row, m in zip(ids, mask, strict=True) for t in row[m].tolist()[:-1]]
    assert not set(inner) & set(stops.tolist())
    assert finished.tolist() == [token in stops.tolist() for token in last]
    assert len({token for token, f in zip(last, finished.tolist(), strict=True) if f}) > 1


def test_sampling_ends_when_all_rows_have_ended(lm: PreTrainedModel) -> None:
    every = torch.arange(lm.config.vocab_size)
    prompts = make_prompts(PROMPTS)
    ids, mask, _, finished = Sampler(12, 1.0).sample(lm, prompts.ids, prompts.mask, every, PAD, draws(0))
    assert ids.shape == (len(PROMPTS), 1)
    assert finished.all()
    assert mask.all()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_the_first_token_is_drawn_from_the_tempered_softmax(lm: PreTrainedModel, temperature: float) -> None:
    """Checklist 14, 15. Pearson's chi-square over the whole vocabulary; and the logprobs are those of the draw."""
    rows = 6000
    prompt = make_prompts(["the film"])
    ids, mask = prompt.ids.repeat(rows, 1), prompt.mask.repeat(rows, 1)
    tokens, _, logprobs, _ = Sampler(1, temperature).sample(lm, ids, mask, STOP, PAD, draws(8))
    with torch.no_grad():
        p = (lm(input_ids=prompt.ids).logits[0, -1].double() / temperature).softmax(0)
    counts = torch.bincount(tokens[:, 0], minlength=len(p)).double()
    common = p * rows >= 5
    observed = torch.cat([counts[common], counts[~common].sum().view(1)])
    expected = rows * torch.cat([p[common], p[~common].sum().view(1)])
    chi_square = ((observed - expected).square() / expected.clamp(min=1e-9)).sum().item()
    degrees = len(observed) - 1
    assert degrees >= 4
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    assert_close(logprobs[:, 0].double(), p.log()[tokens[:, 0]], atol=1e-5, rtol=0)


def test_the_same_seed_draws_the_same_tokens(lm: PreTrainedModel) -> None:
    """Checklist 61. And the shared generator of torch plays no part."""
    torch.manual_seed(0)
    first, state = sample(lm, 12, draws(5)), torch.get_rng_state()
    torch.manual_seed(1)
    again = sample(lm, 12, draws(5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][:, :4], sample(lm, 12, draws(6))[0][:, :4])
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generation_config_in_the_folder_is_not_obeyed(tmp_path: Path) -> None:
    """Checklist 15. Its top-k of 1 would make every draw the most probable token."""
    folder = write_lm(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 0.2, "repetition_penalty": 3.0})
    )
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert lm.generation_config.top_k == 1
    prompts = make_prompts(PROMPTS)
    ids, mask, logprobs, _ = Sampler(8, 0.9).sample(lm, prompts.ids, prompts.mask, STOP, PAD, draws(0))
    greedy = Sampler(8, 0.9).sample(lm, prompts.ids, prompts.mask, STOP, PAD, None)[0]
    assert (ids[:, 0] != greedy[:, 0]).any()
    for row in range(len(ids)):
        prompt, response = prompts.ids[row][prompts.mask[row]], ids[row][mask[row]]
        with torch.no_grad():
            logits = lm(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0].double() / 0.9
        expected = [torch.log_softmax(logits[len(prompt) + t - 1], 0)[token].item() for t, token in enumerate(response)]
        assert logprobs[row][mask[row]].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("tokens", "temperature", "name"), [(0, 1.0, "max_new_tokens"), (4, 0.0, "temperature")])
def test_settings_without_a_response_or_a_distribution_are_refused(tokens: int, temperature: float, name: str) -> None:
    with pytest.raises(SettingError, match=name):
        Sampler(tokens, temperature)


def test_draws_invert_the_distribution_function(lm: PreTrainedModel) -> None:
    """Checklist 15. Row by row, from the same stream: the first token whose cumulative probability exceeds u."""
    prompts = make_prompts(["the film"] * 500)
    tokens, *_ = Sampler(1, 0.8).sample(lm, prompts.ids, prompts.mask, STOP, PAD, draws(4))
    with torch.no_grad():
        ends = (lm(prompts.ids[:1]).logits[0, -1].double() / 0.8).softmax(dim=0).cumsum(dim=0)
    u = torch.rand(500, dtype=torch.float64, generator=draws(4))
    assert tokens[:, 0].tolist() == [int((ends <= x).sum()) for x in u]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5, 6, 7], [6], [1, 5, 2]])
def test_some_rows_of_a_batch_draw_what_they_draw_in_the_whole(lm: PreTrainedModel, rows: list[int]) -> None:
    """Checklist 48. However the batch is shared out; also when the others would have gone on for longer."""
    prompts, index = make_prompts(PROMPTS), torch.tensor(rows)
    ids, mask, logprobs, finished = sample(lm, 12, draws(3))
    own = Sampler(12, 1.0).sample(
        lm, prompts.ids[index], prompts.mask[index], STOP, PAD, draws(3), RowShard(index, len(PROMPTS))
    )
    width = own[0].shape[1]
    assert torch.equal(own[0], ids[index, :width])
    assert torch.equal(own[1], mask[index, :width])
    assert not mask[index, width:].any()
    assert_close(own[2], logprobs[index, :width])
    assert torch.equal(own[3], finished[index])


@pytest.mark.parametrize("size", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK + 50])
def test_inverse_cdf_against_a_plain_sum(size: int) -> None:
    """Checklist 15. Also at both ends of u, and never a token of probability 0."""
    draws = torch.Generator().manual_seed(size)
    p = torch.rand(40, size, generator=draws) * (torch.rand(40, size, generator=draws) < 0.5)
    p[:, size // 2] = 0.25
    u = torch.rand(40, dtype=torch.float64, generator=draws)
    u[0], u[1] = 0.0, 1 - 2**-53
    found = inverse_cdf(p, u)
    assert (p[torch.arange(40), found] > 0).all()
    ends = p.double().cumsum(1)
    below, above = ends[torch.arange(40), found] - p[torch.arange(40), found], ends[torch.arange(40), found]
    assert (below / ends[:, -1] - 1e-6 <= u).all()
    assert (u <= above / ends[:, -1] + 1e-6).all()
