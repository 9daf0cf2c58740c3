"""Decoding in blocks of equal steps, as on a GPU, against decoding step by step. tests/gpu has what needs a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

from src.models.loading import load_causal_lm
from src.rollout import replay, sampling
from src.rollout.kv_cache import rollout_cache
from src.rollout.replay import replayable
from src.rollout.sampling import Sampler
from src.utils.distributed import RowShard
from tests.families import CLASSES, write_family
from tests.tiny import PAD, PROMPTS, make_prompts, model_settings, write_lm

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_causal_lm(model_settings(write_lm(tmp_path_factory.mktemp("lm"))))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("share", [None, RowShard(torch.tensor([1, 4, 6]), 8)], ids=["all rows", "some rows"])
@pytest.mark.parametrize(("steps", "asked"), [(3, 2), (5, 3), (100, 1)])
def test_blocks_draw_the_same_tokens(
    lm: PreTrainedModel, greedy: bool, share: RowShard | None, steps: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ninth token ends a row, so that rows end within blocks and some not at all; the end of all is seen late."""
    prompts = make_prompts(PROMPTS)
    rows = torch.arange(8) if share is None else share.index
    stop = torch.arange(0, lm.config.vocab_size, 9)

    def sample() -> Any:
        draws = None if greedy else torch.Generator().manual_seed(2)
        return Sampler(12, 0.9).sample(lm, prompts.ids[rows], prompts.mask[rows], stop, PAD, draws, share)

    expected = sample()
    assert greedy or expected[3].any()
    blocks = []
    block = replay.Block
    monkeypatch.setattr(sampling, "Block", lambda *given: blocks.append(1) or block(*given))
    monkeypatch.setattr(sampling, "replayable", lambda *_: True)
    monkeypatch.setattr(sampling, "STEPS", steps)
    monkeypatch.setattr(sampling, "ASKED", asked)
    found = sample()
    assert blocks
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(one, other)
    assert_close(found[2], expected[2], atol=1e-5, rtol=0)
    assert torch.equal(found[3], expected[3])


def test_what_is_replayed(lm: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All models that are offered are; not on a CPU, not with another cache, attention, rope or architecture."""
    for family in CLASSES:
        offered = load_causal_lm(model_settings(write_family(tmp_path / family, family)))
        assert replayable(offered, rollout_cache(offered.config), CUDA), family
    assert replayable(lm, rollout_cache(lm.config), CUDA)
    assert not replayable(lm, rollout_cache(lm.config), torch.device("cpu"))
    assert not replayable(lm, DynamicCache(config=lm.config), CUDA)
    for name, value in {
        "_attn_implementation_internal": "eager",
        "rope_parameters": {"rope_type": "dynamic"},
        "model_type": "mamba",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(lm.config, name, value, raising=False)
            assert not replayable(lm, rollout_cache(lm.config) if name != "model_type" else DynamicCache(), CUDA), name
