"""Loaders: batch i is a function of (seed, i) alone, whatever was interrupted when."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from typing import Any

import pytest
from lightning.pytorch.utilities import CombinedLoader

from src.config.compose import compose, leaves
from src.data.loaders import OrderedLoader, StreamLoader
from src.data.modules import PairData, PromptData, TextData, rows_of
from src.errors import DataError
from src.types import Corpus, PreferencePair, PromptRow
from tests.tiny import TinyCorpus, tokenizer

ROWS = [f"row {i}" for i in range(10)]


def collate(rows: list[str], indices: list[int]) -> dict[str, Any]:
    assert rows == [ROWS[i] for i in indices]
    return {"indices": indices}


def stream(batch_size: int = 3, batches: int = 9, seed: int = 1, name: str = "prompts") -> StreamLoader[str]:
    return StreamLoader(ROWS, collate, batch_size=batch_size, batches=batches, seed=seed, stream=name)


def read(loader: Any) -> list[list[int]]:
    return [batch["indices"] for batch in loader]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 13])
def test_every_row_comes_once_in_each_pass_in_a_fresh_order(batch_size: int) -> None:
    """Checklist 52. Also where a batch crosses the edge of a pass, or is longer than one."""
    places = [i for batch in read(stream(batch_size, batches=30 // batch_size + 1)) for i in batch][:30]
    passes = [places[0:10], places[10:20], places[20:30]]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3


def test_a_batch_depends_on_seed_and_number_only() -> None:
    """Checklist 61, 63. Neither on how many follow nor on torch's shared generator."""
    assert read(stream()) == read(stream())
    assert read(stream(batches=4)) == read(stream())[:4]
    assert read(stream(seed=2)) != read(stream())
    assert read(stream(name="texts")) != read(stream())


@pytest.mark.parametrize("done", range(9))
def test_a_resumed_loader_goes_on_with_the_next_batch(done: int) -> None:
    """Checklist 61, 62. Also across the edges of passes (after batches 3 and 6 of 10 rows in threes)."""
    whole, first = stream(), stream()
    iterator = iter(first)
    for _ in range(done):
        next(iterator)
    resumed = stream()
    resumed.load_state_dict(first.state_dict())
    assert read(resumed) == read(whole)[done:]


def test_looking_ahead_changes_nothing() -> None:
    """Across the edges of passes too; after the last batch there is none."""
    loader, seen = stream(), []
    for batch in loader:
        following = loader.peek()
        assert following == loader.peek()
        seen.append((batch["indices"], following and following["indices"]))
    batches = read(stream())
    assert seen == list(zip(batches, [*batches[1:], None], strict=True))


def test_a_loader_at_its_end_starts_over() -> None:
    """Checklist 62. The next epoch is not empty."""
    loader = stream()
    once = read(loader)
    assert loader.state_dict()["cursor"] == 9
    assert len(loader) == 9
    assert read(loader) == once


@pytest.mark.parametrize(("rows", "batch_size"), [(ROWS[::-1], 3), (ROWS[:-1], 3), (ROWS, 5)])
def test_other_rows_begin_at_their_beginning(rows: list[str], batch_size: int) -> None:
    """Checklist 63. Other rows, fewer, or batches of another size; the same rows go on."""
    first = stream()
    iterator = iter(first)
    next(iterator), next(iterator)
    same = stream()
    same.load_state_dict(first.state_dict())
    assert (same.changed, same.cursor) == (False, 2)

    def collate_any(rows: list[str], indices: list[int]) -> dict[str, Any]:
        return {"indices": indices}

    def other() -> StreamLoader[str]:
        return StreamLoader(rows, collate_any, batch_size=batch_size, batches=9, seed=1, stream="prompts")

    changed = other()
    changed.load_state_dict(first.state_dict())
    assert changed.changed
    assert read(changed) == read(other())


def test_an_ordered_loader_gives_every_row_once_in_order() -> None:
    batches = read(OrderedLoader(ROWS, collate, 4))
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(OrderedLoader(ROWS, collate, 4)) == 3
    assert Counter(i for batch in batches for i in batch) == Counter(range(10))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_no_loader_has_workers_that_could_die(stage: str) -> None:
    """Every batch is made in the process that trains; there is no key for workers either."""
    data: Any = {
        "sft": lambda: TextData(TinyCorpus(), tokenizer(), batch_size=2, steps=1, eval_rows=2, max_tokens=9, seed=1),
        "reward": lambda: PairData(
            TinyCorpus(), tokenizer(), batch_size=1, steps=1, max_tokens=9, chat_template=False, lm_coef=0.0, seed=1
        ),
        "ppo": lambda: PromptData(
            TinyCorpus(), tokenizer(), batch_size=2, samples_per_prompt=1, iterations=1, eval_prompts=2,
            eval_batch_size=2, max_prompt_tokens=8, max_text_tokens=9, ptx_coef=0.1, seed=1,
        ),
    }[stage]()  # fmt: skip
    data.setup("fit")
    found = [data.train_dataloader(), data.test_dataloader()]
    loaders = [x for one in found for x in (one.flattened if isinstance(one, CombinedLoader) else [one])]
    assert len(loaders) >= 2
    assert all(isinstance(loader, StreamLoader | OrderedLoader) for loader in loaders)
    before = set(multiprocessing.active_children())
    assert all(next(iter(loader)) for loader in loaders)
    assert set(multiprocessing.active_children()) == before
    assert not [key for key in leaves(compose([f"stage={stage}"]).plain()) if "worker" in key]


def test_what_cannot_be_loaded_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        stream(batch_size=0)
    with pytest.raises(DataError, match="no rows for prompts"):
        StreamLoader([], collate, batch_size=1, batches=1, seed=1, stream="prompts")


class Films(Corpus):
    """A corpus of somebody's own, which lists whatever it is given."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def prompts(self, split: str) -> Any:
        return self.rows

    def texts(self, split: str) -> Any:
        return self.rows


def test_a_corpus_of_other_rows_is_refused_with_what_to_give() -> None:
    """Before a model answers anything."""
    for rows, message in (
        (["my dog is"], "Films.prompts('train')[0] is of type str: give PromptRow('my dog is')"),
        ([PromptRow("a"), 5], "Films.prompts('train')[1] is of type int: give PromptRow"),
        ([], "Films.prompts('train') is empty: PPO needs at least one row"),
        (None, "Films.prompts('train') is None: PPO needs a list of PromptRow"),
        ("my dog is", "Films.prompts('train') is 'my dog is': PPO needs a list of PromptRow"),
    ):
        with pytest.raises(DataError) as refused:
            PromptData(Films(rows), tokenizer()).train_dataloader()
        assert str(refused.value) == message
    with pytest.raises(DataError, match=r"Films\.texts\('train'\)\[0\] is of type PromptRow: give str"):
        rows_of(Films([PromptRow("a")]), "texts", "train")
    with pytest.raises(DataError, match=r"Films has no pairs: the reward model reads `pairs\(split\)`"):
        rows_of(Films([]), "pairs", "train")
    with pytest.raises(DataError, match=r"the corpus \(list\) has no method prompts\(split\): PPO needs one"):
        PromptData(["my dog is"], tokenizer()).train_dataloader()  # type: ignore[arg-type]


class Gap(TinyCorpus):
    """A corpus of which one split has no rows."""

    def __init__(self, without: str) -> None:
        self.without = without

    def texts(self, split: str) -> list[str]:
        return [] if split == self.without else super().texts(split)

    def pairs(self, split: str) -> list[PreferencePair]:
        return [] if split == self.without else super().pairs(split)

    def prompts(self, split: str) -> list[PromptRow]:
        return [] if split == self.without else super().prompts(split)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_without_rows_is_refused_before_anything_is_trained(split: str) -> None:
    sizes: dict[str, Any] = {"batch_size": 2, "steps": 1, "max_tokens": 8, "seed": 1}
    texts = TextData(Gap(split), tokenizer(), eval_rows=2, **sizes)
    pairs = PairData(Gap(split), tokenizer(), chat_template=False, lm_coef=0.0, **sizes)
    for data, name in ((texts, "texts"), (pairs, "pairs")):
        with pytest.raises(DataError, match=rf"Gap\.{name}\('{split}'\) is empty"):
            data.setup("fit")
    if split == "test":
        with pytest.raises(DataError, match=r"Gap\.prompts\('test'\) is empty"):
            PromptData(Gap(split), tokenizer()).setup("fit")
