"""The embedded reviews: form, sentiment, splits, pairs and the grammar as a judge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import product
from random import Random
from typing import Any

import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from src.data.embedded.grammar import MOODS, RULES, SLOT, TONES, accepts, grammar_reward, pattern, resolve, write_review
from src.data.embedded.reviews import Reviews

SPLITS = ("train", "validation", "test")
ANALYZER = SentimentIntensityAnalyzer()


class Vader:
    """VADER compound of the whole text."""

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        assert len(prompts) == len(responses) == len(metadata)
        return [ANALYZER.polarity_scores(a + b)["compound"] for a, b in zip(prompts, responses, strict=True)]


class Constant:
    """A judge for whom everything ties."""

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [0.5] * len(prompts)


def tokens(text: str) -> list[str]:
    return re.findall(r"[^\s.,!]+|[.,!]", text)


def compound(text: str) -> float:
    return float(ANALYZER.polarity_scores(text)["compound"])


@pytest.fixture(scope="module")
def small() -> Reviews:
    return Reviews(Vader(), n_reviews=3_000, n_pairs=1_200)


@pytest.fixture(scope="module")
def full() -> dict[str, list[str]]:
    corpus = Reviews(Vader())
    return {split: corpus.texts(split) for split in SPLITS}


def test_default_size_has_distinct_reviews_and_disjoint_splits(full: dict[str, list[str]]) -> None:
    """A twelfth each but for the last prompt, whose reviews no longer fit."""
    assert len({text for split in SPLITS for text in full[split]}) == sum(map(len, full.values())) == 60_000
    assert all(4_950 <= len(full[split]) <= 5_000 for split in ("validation", "test"))


@pytest.mark.parametrize("words", [2, 3, 4])
@pytest.mark.parametrize("n_reviews", [12, 24, 600])
def test_no_prompt_is_in_two_splits(words: int, n_reviews: int) -> None:
    corpus = Reviews(Vader(), n_reviews=n_reviews, prompt_words=words)
    rows = [{row.prompt for row in corpus.prompts(split)} for split in SPLITS]
    assert all(rows)
    assert sum(map(len, rows)) == len(set().union(*rows))
    assert sum(len(corpus.texts(split)) for split in SPLITS) == n_reviews


def test_about_a_hundred_prompts_are_held_out_at_the_default_size(full: dict[str, list[str]]) -> None:
    prompts = {split: {" ".join(text.split(" ")[:4]) for text in full[split]} for split in SPLITS}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 1_043
    assert min(len(prompts["validation"]), len(prompts["test"])) >= 80


def test_default_size_fits_the_token_budget_and_the_vocabulary(full: dict[str, list[str]]) -> None:
    texts = [text for split in SPLITS for text in full[split]]
    assert max(len(tokens(text)) for text in texts) <= 31
    # A prompt of four words is four tokens only without punctuation.
    assert all(len(tokens(" ".join(text.split(" ")[:4]))) == 4 for text in texts[:10_000])
    words = {word for text in texts for word in tokens(text)}
    assert 200 <= len(words) <= 600
    # No review of a held-out split has a word that training never shows.
    assert words == {word for text in full["train"] for word in tokens(text)}


def test_longest_possible_review_fits_the_token_budget() -> None:
    def longest(slot: str, tone: str) -> int:
        return max(
            sum(longest(part, tone) if place % 2 else len(tokens(part)) for place, part in enumerate(SLOT.split(form)))
            for form in RULES[resolve(slot, tone)]
        )

    sentence = {slot: max(longest(slot, tone) for tone in TONES) for slot in ("opener", "follow")}
    assert sentence["opener"] + 2 * sentence["follow"] <= 31


def test_mean_sentiment_is_near_zero_and_wide(full: dict[str, list[str]]) -> None:
    scores = [compound(text) for text in full["train"][:3_000]]
    mean = sum(scores) / len(scores)
    assert -0.05 <= mean <= 0.1
    assert sum(score > 0.5 for score in scores) > 600
    assert sum(score < -0.5 for score in scores) > 600


def test_prompts_leave_the_sentiment_open(full: dict[str, list[str]]) -> None:
    prompts = {" ".join(text.split(" ")[:4]) for text in full["train"]}
    assert 500 <= len(prompts) <= 5_000  # of training
    assert {compound(prompt) for prompt in prompts} == {0.0}


@pytest.mark.parametrize(("chances", "sign"), [((1.0, 0.0, 0.0), 1.0), ((0.0, 1.0, 0.0), -1.0)])
def test_one_tone_everywhere_moves_the_score_and_keeps_the_variety(
    chances: tuple[float, float, float], sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MOODS, "single", chances)
    texts = [write_review("single", Random(row)) for row in range(2_000)]
    assert sum(map(compound, texts)) / len(texts) * sign >= 0.7
    assert len(set(texts)) / len(texts) > 0.9


def test_words_of_a_tone_have_that_tone_in_the_lexicon() -> None:
    for slot, forms in RULES.items():
        for word in tokens(" ".join(form for form in forms if not SLOT.search(form))):
            valence = ANALYZER.lexicon.get(word.lower(), 0.0)
            if word in ("a", "an") or slot.startswith("very_"):
                continue
            if slot.endswith("_good"):
                assert valence >= 1.4, (slot, word)
            elif slot.endswith("_bad"):
                assert valence <= -1.2, (slot, word)
            else:
                assert valence == 0.0, (slot, word)


def test_every_sentence_has_a_word_of_tone() -> None:
    def fewest(slot: str) -> int:
        if f"{slot}_good" in RULES:
            return 1
        return min(sum(fewest(name) for name in SLOT.findall(form)) for form in RULES[slot])

    assert fewest("opener") >= 1
    assert fewest("follow") >= 1


def test_words_of_tone_must_agree_within_a_sentence(small: Reviews) -> None:
    assert accepts("The acting was superb and lovely.")
    assert accepts("The acting was utterly awful.")
    assert not accepts("The acting was truly awful.")
    assert not accepts("The acting was superb and dismal.")


def test_seed_fixes_everything_and_another_seed_changes_it() -> None:
    first, again, other = (Reviews(Vader(), n_reviews=2_400, n_pairs=100, seed=seed) for seed in (3, 3, 4))
    for split in SPLITS:
        assert first.texts(split) == again.texts(split)
        assert first.pairs(split) == again.pairs(split)
        assert not set(first.texts(split)) & set(other.texts(split))


@pytest.mark.parametrize("words", [2, 3, 4])
def test_prompts_are_the_first_words_of_the_texts(words: int) -> None:
    corpus = Reviews(Vader(), n_reviews=120, prompt_words=words)
    texts, prompts = corpus.texts("train"), corpus.prompts("train")
    assert [row.prompt for row in prompts] == [" ".join(text.split()[:words]) for text in texts]
    assert all(row.metadata == {} for row in prompts)
    assert all(text[len(row.prompt)] == " " for text, row in zip(texts, prompts, strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_come_from_the_reviews_of_their_split(small: Reviews, split: str) -> None:
    texts, pairs = set(small.texts(split)), small.pairs(split)
    assert pairs
    assert len({frozenset((pair.chosen, pair.rejected, pair.prompt)) for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert len(pair.prompt.split(" ")) == 4
        assert {pair.prompt + pair.chosen, pair.prompt + pair.rejected} <= texts
        assert pair.chosen.startswith(" ")
        assert pair.rejected.startswith(" ")


@pytest.mark.parametrize(("split", "share"), [("train", 0.1), ("validation", 0.0), ("test", 0.0)])
def test_only_train_labels_are_flipped_and_the_gap_stays_true(small: Reviews, split: str, share: float) -> None:
    pairs = small.pairs(split)
    differences = [compound(pair.prompt + pair.chosen) - compound(pair.prompt + pair.rejected) for pair in pairs]
    assert all(pair.gap == pytest.approx(abs(d)) for pair, d in zip(pairs, differences, strict=True))
    assert all(difference != 0.0 for difference in differences)
    assert sum(difference < 0 for difference in differences) == round(share * len(pairs))


def test_pairs_are_as_many_as_asked_and_fewer_for_the_smaller_splits() -> None:
    corpus = Reviews(Vader(), n_reviews=2_400, n_pairs=600, prompt_words=2)
    sizes = [len(corpus.texts(split)) for split in SPLITS]
    assert [len(corpus.pairs(split)) for split in SPLITS] == [600 * size // sizes[0] for size in sizes]
    assert min(sizes) > 100


def test_no_pairs_at_all_is_an_error_and_not_an_empty_list() -> None:
    with pytest.raises(ValueError, match="n_reviews must be large enough for pairs in 'test', but is 120"):
        Reviews(Constant(), n_reviews=120).pairs("test")


def test_grammar_accepts_what_it_writes(small: Reviews) -> None:
    assert set(small.quality(small.texts("train"))["grammatical"]) == {1.0}


def test_a_pattern_accepts_a_whole_small_language_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "tiny", ("{tiny_head} b.", "{tiny_head}{tiny_head}"))
    monkeypatch.setitem(RULES, "tiny_head", ("a", "ab"))
    language = {"a b.", "ab b.", "aa", "aab", "aba", "abab"}
    tried = {"".join(letters) for n in range(6) for letters in product("ab. ", repeat=n)}
    assert {text for text in tried if re.fullmatch(pattern("tiny", "good"), text)} == language


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("   ", 0.0),
        ("The plot was superb.", 1.0),
        ("The plot was superb. What a mess it was!", 1.0),
        ("The plot was superb. What a mess it was.", 0.5),  # this sentence ends in "!" only
        ("The plot was superb. The plot was", 0.5),
        ("The plot was superb.. What a mess it was!", 2 / 3),
        ("The plot was superb. ", 0.5),
        ("The plot was superb.What a mess it was!", 0.5),
        ("The plot was superb.  What a mess it was!", 0.5),
        (" The plot was superb.", 0.0),
        ("the plot was superb.", 0.0),
        ("The plot superb was. superb superb.", 0.0),
        ("The plot were superb. The songs were superb. The songs was superb.", 1 / 3),
    ],
)
def test_grammatical_share_by_hand(small: Reviews, text: str, share: float) -> None:
    assert small.quality([text])["grammatical"] == [pytest.approx(share)]


def test_grammar_as_a_reward_reads_prompt_and_response_together() -> None:
    texts = {
        ("The acting was", " superb and lovely."): 1.0,
        ("The acting was", " superb and lovely. Sunday the."): 0.5,  # one sentence of two
        ("The acting was", " superb and"): 0.0,  # unfinished
    }
    prompts, responses = map(list, zip(*texts, strict=True))
    assert grammar_reward(prompts, responses, [{}] * 3) == list(texts.values())


def test_shuffled_words_are_not_grammatical(small: Reviews) -> None:
    rng = Random(0)
    texts = small.texts("test")
    shuffled = [" ".join(rng.sample(words, len(words))) for words in (text.split(" ") for text in texts)]
    assert sum(small.quality(shuffled)["grammatical"]) / len(texts) < 0.05


def test_all_rows_are_used_about_equally_often_in_pairs(small: Reviews) -> None:
    uses = Counter(pair.prompt + text for pair in small.pairs("train") for text in (pair.chosen, pair.rejected))
    # 1,200 pairs of 2,500 reviews need at most a few rounds, each of which uses a review once.
    assert max(uses.values()) <= 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reviews(Vader(), n_reviews=11), "n_reviews must be at least 12, but is 11"),
        (lambda: Reviews(Vader(), n_pairs=0), "n_pairs must be at least 1, but is 0"),
        (lambda: Reviews(Vader(), flip=0.6), "flip must be between 0 and 0.5, but is 0.6"),
        (lambda: Reviews(Vader(), flip=float("nan")), "flip must be between 0 and 0.5, but is nan"),
        (lambda: Reviews(Vader(), prompt_words=5), "prompt_words must be between 2 and 4, but is 5"),
        (lambda: Reviews(Vader()).texts("tests"), "split must be one of train, validation, test, but is 'tests'"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
