"""Passes without padding against passes with it: every kind of decoder, every kernel, numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from src.kernels import padding_free
from src.kernels.fast_layers import with_fast_layers
from src.models.forward import gradient_checkpointing, hidden_states
from src.models.loading import load_causal_lm
from src.rollout import kv_cache
from src.types import select
from src.utils.double_backward import twice_differentiable
from tests.models import architectures
from tests.tiny import FOREIGN_WARNINGS, make_maker, make_prompts, make_roles, model_settings, ragged_rollout, seeded

pytestmark = FOREIGN_WARNINGS
families = pytest.mark.parametrize("family", architectures.DECODERS)
IDS = torch.randint(3, 20, (6, 13), generator=torch.Generator().manual_seed(0))
# left padding, right padding, both, none, an empty row, a single token
ROWS = ["0001111111111", "1111000000000", "0011111110000", "1111111111111", "0000000000000", "0000001000000"]
MASK = torch.tensor([[sign == "1" for sign in row] for row in ROWS])


@pytest.fixture(autouse=True)
def three_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass is filled up by three tokens."""
    monkeypatch.setattr(padding_free, "few_sizes", lambda count: count + 3)


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Ask for passes without padding, or with it, whatever would pay."""
    return lambda spared: monkeypatch.setattr(padding_free, "SPARED", -1 if spared else 2**62)


def both(
    lm: PreTrainedModel, wanted: Callable[[bool], None], checkpointing: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states of the counted tokens and the gradient of all weights: with padding, and without."""
    weights = torch.randn(int(MASK.sum()), lm.config.hidden_size, generator=torch.Generator().manual_seed(1))
    found = []
    for spared in (False, True):
        wanted(spared)
        with gradient_checkpointing(lm, checkpointing):
            states = hidden_states(lm, IDS, MASK)[MASK]
        parameters = list(lm.base_model.parameters())
        gradients = torch.autograd.grad((states * weights.to(states)).sum(), parameters)
        found.append([states.detach(), *gradients])
    return found[0], found[1]


@pytest.fixture(params=[0, 512], ids=["fused", "single products"])
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The longest row that is done in single products, in double precision too."""
    length: int = request.param
    monkeypatch.setitem(padding_free.SHORT, torch.float64, length)
    return length


@families
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_numbers_and_gradients_are_those_with_padding(
    family: str, checkpointing: bool, tmp_path: Path, wanted: Callable[[bool], None]
) -> None:
    """Checklist 2, 11, 12, 47. Padding on either side, none, and a row without a token."""
    lm = load_causal_lm(model_settings(architectures.write(tmp_path, family), dtype="float64"))
    padded, spared = both(lm, wanted, checkpointing)
    assert_close(spared, padded, atol=1e-10, rtol=0)
    assert all(gradient.abs().max() > 1e-6 for gradient in padded[1:3])


@families
def test_no_padding_passes_through_the_layers(family: str, tmp_path: Path, wanted: Callable[[bool], None]) -> None:
    """Checklist 11. Or the comparison above compares nothing: a third of the elements are padding."""
    lm = load_causal_lm(model_settings(architectures.write(tmp_path, family)))
    seen: list[int] = []
    norm = next(m for name, m in lm.named_modules() if name.rpartition(".")[2] in ("ln_f", "norm", "final_layer_norm"))
    norm.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape[:-1].numel()))
    for spared in (False, True):
        wanted(spared)
        states = hidden_states(lm, IDS, MASK)
    assert seen == [MASK.numel(), int(MASK.sum()) + 3]
    assert not states[~MASK].any()


@pytest.mark.usefixtures("short")
def test_a_sliding_window_slides_within_each_row(tmp_path: Path, wanted: Callable[[bool], None]) -> None:
    sizes: dict[str, Any] = dict(architectures.SIZES)
    config = Qwen2Config(
        **sizes, num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    assert config.layer_types == ["full_attention", "sliding_attention"]
    lm = with_fast_layers(seeded(lambda: Qwen2ForCausalLM(config), 0).double().eval())
    padded, spared = both(lm, wanted)
    assert_close(spared, padded, atol=1e-10, rtol=0)


@families
@pytest.mark.parametrize("spared", [False, True], ids=["padding", "no padding"])
def test_plain_products_give_what_fused_attention_gives(
    family: str, spared: bool, tmp_path: Path, wanted: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 on a CPU they are taken for short rows; here they are compared in double precision."""
    lm = load_causal_lm(model_settings(architectures.write(tmp_path, family), dtype="float64"))
    wanted(spared)
    weights = torch.linspace(-1, 1, int(MASK.sum()) * 16, dtype=torch.float64).view(-1, 16)

    def run() -> list[Tensor]:
        states = hidden_states(lm, IDS, MASK)[MASK]
        return [states.detach(), *torch.autograd.grad((states * weights).sum(), list(lm.base_model.parameters()))]

    fused = run()
    taken: list[int] = []

    def plainly(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        taken.append(1)
        return padding_free._plain(query, key, value, mask, options["scaling"])

    monkeypatch.setattr(padding_free, "_attend", plainly)
    assert_close(run(), fused, atol=1e-10, rtol=0)
    assert taken


@pytest.mark.parametrize(("dtype", "length", "plainly"), [
    (torch.bfloat16, 8, True), (torch.bfloat16, padding_free.SHORT[torch.bfloat16] + 1, False),
    (torch.float32, 8, False),
])  # fmt: skip
def test_plain_products_are_taken_in_half_precision_for_short_rows(
    dtype: torch.dtype, length: int, plainly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padding_free, "bfloat16_is_native", lambda: True)
    taken: list[int] = []
    plain = padding_free._plain
    monkeypatch.setattr(padding_free, "_plain", lambda *given: (taken.append(1), plain(*given))[1])
    states = torch.randn(3, 1, 2, length, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    module = torch.nn.Module()
    padding_free.attention(module, *states, None, scaling=0.5, dropout=0.0)
    assert bool(taken) == plainly


@pytest.mark.parametrize(("dtype", "longest", "within", "taken"), [
    (torch.float32, 0, False, True), (torch.bfloat16, 0, False, True), (torch.float64, 0, False, False),
    (torch.float32, 1, False, False), (torch.float32, 0, True, False),
], ids=["single", "half", "double", "long", "to be differentiated again"])  # fmt: skip
def test_rows_are_done_in_single_products_where_that_is_faster(
    dtype: torch.dtype, longest: int, within: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padding_free, "bfloat16_is_native", lambda: True)
    called: list[int] = []
    monkeypatch.setattr(padding_free, "short_rows", lambda *given: called.append(1))
    lengths = [3, padding_free.SHORT[torch.float32] + longest]
    states = torch.ones(3, 1, 2, sum(lengths), 4, dtype=dtype)
    with twice_differentiable() if within else nullcontext():
        padding_free.attention(torch.nn.Module(), *states, None, lengths, scaling=0.5, dropout=0.0)
    assert bool(called) == taken


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("lengths", [None, [3, 5], [3, padding_free.SHORT[torch.float32] + 1]])
def test_without_units_for_bfloat16_attention_is_computed_in_float32_and_rounded(
    lengths: list[int] | None, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the gradients of query, key and value, and rounded once: autocast would round the attention weights too."""
    monkeypatch.setattr(padding_free, "bfloat16_is_native", lambda: False)
    shape = (3, 1, 2, sum(lengths or [8]), 4)
    narrow = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    options: dict[str, Any] = {"scaling": 0.5, "dropout": 0.0}
    above = torch.linspace(-1, 1, narrow[0].numel()).view(1, -1, *shape[2::2]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = padding_free.attention(torch.nn.Module(), *narrow, None, lengths, **options)
        (slope,) = torch.autograd.grad(found, narrow, above)
    expected, _ = padding_free.attention(torch.nn.Module(), *wide, None, lengths, **options)
    assert torch.equal(found, expected.bfloat16())
    (wanted,) = torch.autograd.grad(expected, wide, above.float())
    assert torch.equal(slope, wanted.bfloat16())


@families
def test_a_model_can_be_differentiated_twice_where_that_is_asked_for(
    family: str, tmp_path: Path, wanted: Callable[[bool], None]
) -> None:
    """A product of the Hessian and a vector, as trust regions need it: that of transformers' model, row by row."""
    path = architectures.write(tmp_path, family)
    wanted(True)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float64).eval()
    products = []
    for lm in (load_causal_lm(model_settings(path, dtype="float64")), plain):
        parameter = next(p for name, p in lm.base_model.named_parameters() if p.dim() == 2 and ".0." in name)
        vector = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with twice_differentiable():
            rows = (
                [(IDS, MASK)] if lm is not plain else [(i[m][None], m[m][None]) for i, m in zip(IDS, MASK, strict=True)]
            )
            loss = sum(hidden_states(lm, *row)[row[1]].tanh().sum() for row in rows if row[1].any())
            (slope,) = torch.autograd.grad(loss, parameter, create_graph=True)
            products += torch.autograd.grad((slope * vector).sum(), parameter)
    assert products[0].abs().max() > 1e-2
    assert_close(products[0], products[1], atol=1e-4, rtol=1e-4)


@families
@pytest.mark.usefixtures("short")
def test_prompts_in_a_cache_are_those_with_padding(
    family: str, tmp_path: Path, wanted: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checklist 2, 58. What comes after the prompts, and after one token more; in one piece and in several."""
    lm = load_causal_lm(model_settings(architectures.write(tmp_path, family), dtype="float64"))
    mask = torch.arange(9) >= torch.tensor([[8], [3], [0], [5], [5]])
    ids, token = IDS[:5, :9] * mask, torch.tensor([[4], [5], [6], [7], [8]])
    longer = torch.cat([mask, mask.new_ones(5, 1)], dim=1)
    found = []
    for spared, piece in ((False, 1024), (True, 1024), (True, 20)):
        wanted(spared)
        monkeypatch.setattr(kv_cache, "PIECE", piece)
        with torch.no_grad():
            logits, cache = kv_cache.prefill(lm, ids, mask.long())
            found.append([logits, kv_cache.next_logits(lm, token, longer, mask.sum(1, keepdim=True), cache)])
    for spared_ones in found[1:]:
        assert_close(spared_ones, found[0], atol=1e-10, rtol=0)


def test_it_pays_where_wide_layers_are_spared_much_padding(tmp_path: Path) -> None:
    """Padding per row times the width squared, 16 here, against a limit; never with another attention."""
    lm = load_causal_lm(model_settings(architectures.write(tmp_path, "gpt2")))
    much = torch.ones(2, 2 * padding_free.SPARED // 256 + 2, dtype=torch.bool)
    much[0, 1:] = False
    assert padding_free.saves_time(lm.base_model, much)
    much[0, 1:3] = True
    assert not padding_free.saves_time(lm.base_model, much)
    eager = load_causal_lm(model_settings(architectures.write(tmp_path, "gpt2"), attn_implementation="eager"))
    assert not padding_free.saves_time(eager.base_model, torch.zeros_like(much))


def test_saved_models_know_nothing_of_it(tmp_path: Path) -> None:
    """A folder must load where this project is not installed."""
    roles = make_roles(architectures.write(tmp_path / "base", "gpt2"))
    assert roles.merged_policy().config._attn_implementation == padding_free.NAME
    roles.merged_policy().save_pretrained(tmp_path / "saved")
    assert padding_free.NAME not in (tmp_path / "saved/config.json").read_text()


def test_dropping_rows_changes_no_other_row(tmp_path: Path, wanted: Callable[[bool], None]) -> None:
    """Checklist 3. What a row gives does not depend on its neighbors in the pack."""
    roles = make_roles(architectures.write(tmp_path, "llama"), spread=0.2, dtype="float64")
    wanted(True)
    rollout = ragged_rollout()
    whole = roles.distribution(rollout, 0.8).logprobs()
    for row in range(len(whole)):
        alone = roles.distribution(select(rollout, torch.tensor([row])), 0.8).logprobs()
        assert_close(alone, whole[row : row + 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_token_that_is_drawn_sees_the_whole_cache(heads: int) -> None:
    """One query, more keys and no mask, as transformers asks where no row is padded: in half precision as in single."""
    draws = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 1, 4, generator=draws)
    key, value = torch.randn(2, 3, heads, 5, 4, generator=draws)
    module = torch.nn.Module()
    whole = [x.repeat_interleave(2 // heads, dim=1) for x in (key, value)]
    weights = (query @ whole[0].transpose(2, 3) * 0.5).softmax(-1)
    expected = (weights @ whole[1]).transpose(1, 2)
    halves = [x.bfloat16() for x in (query, key, value)]
    found, _ = padding_free.attention(module, *halves, None, scaling=0.5, dropout=0.0)
    assert_close(found.float(), expected, atol=0.05, rtol=0)


def test_in_half_precision_rollouts_of_equal_prompts_are_scored_as_they_were_drawn(tmp_path: Path) -> None:
    """Checklist 3, 58. Without padding there is no mask in any step."""
    roles = make_roles(architectures.write(tmp_path, "llama"), spread=0.2, dtype="bfloat16")
    prompts = make_prompts(["the film", "a bad", "we liked"])
    assert prompts.mask.all()
    rollout = make_maker().sample(roles, "policy", prompts, 0, torch.Generator().manual_seed(0))
    scored = roles.distribution(rollout, 1.0).logprobs().detach()
    assert_close(scored, rollout.behavior_logprobs, atol=0.25, rtol=0)
