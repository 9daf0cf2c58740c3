"""The embedded corpus: short film reviews of mixed sentiment, written by a seeded grammar."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from random import Random

from src.data.embedded.grammar import MOODS, grammatical_share, write_review
from src.data.tables import SPLITS, check_split, cut_prompt, split_by_prompt
from src.errors import require
from src.types import PreferencePair, PromptRow, Reward

# Most rounds of pairing; a small split may have no further pairs.
MAX_ROUNDS = 20


class Reviews:
    """Film reviews of two or three sentences whose tones follow the mood of the review.

    Everything is made on first use, kept, and a function of the seed. No two reviews are equal, and no prompt is in two
    splits: about a twelfth of the reviews is the validation split, a twelfth the test split, the rest the train split.
    """

    def __init__(
        self,
        gold: Reward,
        n_reviews: int = 60_000,
        n_pairs: int = 32_000,
        flip: float = 0.1,
        prompt_words: int = 4,
        seed: int = 1,
    ) -> None:
        """Check the arguments; the reviews are made on first use.

        Args:
            gold: Scores whole reviews (prompt and response together); orders the pairs.
            n_reviews: Distinct reviews over all splits.
            n_pairs: Most pairs of the train split; the other splits have proportionally fewer.
            flip: Share of the train pairs whose label is wrong.
            prompt_words: Words of a review that are its prompt; the grammar has no punctuation within the first four.
            seed: Fixes the reviews, the pairs and the flipped labels.
        """
        require(n_reviews >= len(SPLITS) * 4, "n_reviews", n_reviews, "at least 12")
        require(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
        require(0.0 <= flip <= 0.5, "flip", flip, "between 0 and 0.5")
        require(2 <= prompt_words <= 4, "prompt_words", prompt_words, "between 2 and 4")
        self.gold = gold
        self.n_reviews = n_reviews
        self.n_pairs = n_pairs
        self.flip = flip
        self.prompt_words = prompt_words
        self.seed = seed
        self._pairs: dict[str, list[PreferencePair]] = {}

    def texts(self, split: str) -> list[str]:
        """Return the reviews of a split, each once in the whole corpus."""
        check_split(split)
        return self._reviews[split]

    def prompts(self, split: str) -> list[PromptRow]:
        """Return the first words of each review of a split, in the order of `texts`; prompts repeat within a split."""
        return [PromptRow(cut_prompt(text, self.prompt_words)[0]) for text in self.texts(split)]

    def pairs(self, split: str) -> list[PreferencePair]:
        """Return pairs of completions of one prompt, both from reviews of the split; `gold` decides which is chosen.

        Ties are dropped. In the train split a share `flip` of the pairs has chosen and rejected swapped, as noisy human
        labels would; `gap` keeps the true size of the difference, so that it does not reveal a flipped pair.
        """
        check_split(split)
        if split not in self._pairs:
            self._pairs[split] = self._make_pairs(split)
        return list(self._pairs[split])

    def quality(self, texts: list[str]) -> dict[str, list[float]]:
        """Return "grammatical": the share of a text's sentences that the grammar accepts, 0 for an empty text."""
        return {"grammatical": [grammatical_share(text) for text in texts]}

    @cached_property
    def _reviews(self) -> dict[str, list[str]]:
        rng = Random(f"{self.seed}/reviews")
        moods = list(MOODS)
        found: dict[str, None] = {}  # a set that keeps the order
        while len(found) < self.n_reviews:
            found[write_review(rng.choice(moods), rng)] = None
        texts = list(found)
        prompts = [cut_prompt(text, self.prompt_words)[0] for text in texts]
        rows = split_by_prompt(prompts, self.n_reviews // 12, f"{self.seed}/splits", _of_known_words(set(prompts)))
        require(all(rows.values()), "n_reviews", self.n_reviews, "large enough to hold out prompts for two splits")
        return {split: [texts[row] for row in rows[split]] for split in SPLITS}

    def _make_pairs(self, split: str) -> list[PreferencePair]:
        """Pair the reviews of a split and, in the train split, flip some labels."""
        rng = Random(f"{self.seed}/pairs/{split}")
        cuts = [cut_prompt(text, self.prompt_words) for text in self.texts(split)]
        scores = self._scores(cuts)
        wanted = max(1, self.n_pairs * len(cuts) // len(self.texts("train")))
        matches = _matches([prompt for prompt, _ in cuts], scores, wanted, rng)
        if not matches:
            raise ValueError(f"n_reviews must be large enough for pairs in {split!r}, but is {self.n_reviews}")
        pairs = [_ordered(cuts[a], cuts[b], scores[a] - scores[b]) for a, b in matches]
        for row in rng.sample(range(len(pairs)), round(self.flip * len(pairs))) if split == "train" else []:
            pairs[row] = replace(pairs[row], chosen=pairs[row].rejected, rejected=pairs[row].chosen)
        return pairs

    def _scores(self, cuts: list[tuple[str, str]]) -> list[float]:
        """Return the gold score of each (prompt, response)."""
        prompts, responses = (list(part) for part in zip(*cuts, strict=True))
        return [float(score) for score in self.gold.score(prompts, responses, [{} for _ in cuts])]


def _of_known_words(prompts: set[str]) -> set[str]:
    """The prompts each of whose words is in another prompt too: training should know all words of a held-out one."""
    uses = Counter(word for prompt in prompts for word in set(prompt.split()))
    return {prompt for prompt in prompts if all(uses[word] > 1 for word in prompt.split())}


def _matches(prompts: list[str], scores: list[float], wanted: int, rng: Random) -> list[tuple[int, int]]:
    """Return up to `wanted` different pairs of rows with equal prompts and different scores, in random order.

    Each round pairs every row at most once, so that all rows are used about equally often.
    """
    buckets: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        buckets[prompt].append(row)
    found: dict[tuple[int, int], None] = {}  # a set that keeps the order
    for _ in range(MAX_ROUNDS):
        couples = [couple for rows in buckets.values() for couple in _couples(rows, rng)]
        rng.shuffle(couples)
        found.update(dict.fromkeys((a, b) for a, b in couples if scores[a] != scores[b]))
        if len(found) >= wanted:
            break
    return list(found)[:wanted]


def _couples(rows: list[int], rng: Random) -> Iterator[tuple[int, int]]:
    """Yield disjoint couples of the rows, the smaller row first; one row is left over when their number is odd."""
    shuffled = rng.sample(rows, len(rows))
    for a, b in zip(shuffled[::2], shuffled[1::2], strict=False):
        yield min(a, b), max(a, b)


def _ordered(a: tuple[str, str], b: tuple[str, str], difference: float) -> PreferencePair:
    """Return the pair of two (prompt, response) with equal prompts; `difference` is score of a - score of b."""
    better, worse = (a, b) if difference > 0 else (b, a)
    return PreferencePair(prompt=a[0], chosen=better[1], rejected=worse[1], gap=abs(difference))
