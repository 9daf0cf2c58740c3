"""The grammar of the embedded film reviews: one dictionary that writes sentences and recognizes them.

A rule maps a slot to its alternatives, which name other slots in braces. No slot reaches itself, so the language is
finite and one regular expression accepts exactly its sentences.

A sentence has one tone, good, bad or plain, and its words of tone agree: slot `adj` of a good sentence is rule
`adj_good`, words with a positive score in a sentiment lexicon. A language model must learn which words go together.
A review has a mood, which sets the chances of its sentences' tones.
"""

from __future__ import annotations

import re
from functools import cache
from random import Random
from typing import Any

SLOT = re.compile(r"\{(\w+)\}")

TONES = ("good", "bad", "plain")

# The chances of each tone in a sentence, by the mood of the review; all moods are equally likely.
MOODS = {"warm": (0.85, 0.05, 0.1), "cold": (0.05, 0.85, 0.1), "mixed": (0.4, 0.4, 0.2)}


def _toned(slot: str, good: list[str], bad: list[str], plain: list[str]) -> dict[str, tuple[str, ...]]:
    """The three rules of a slot whose words have a tone."""
    return {f"{slot}_{tone}": tuple(words) for tone, words in zip(TONES, (good, bad, plain), strict=True)}


_TONED: dict[str, tuple[str, ...]] = {
    **_toned(
        "adj",
        """amazing beautiful brilliant charming excellent fantastic great impressive lovely perfect superb
        wonderful""".split(),
        "awful bad disastrous dismal dreadful horrible lousy miserable pathetic poor stupid terrible".split(),
        "average conventional modern ordinary traditional usual".split(),
    ),
    **_toned(
        "very",
        "always really simply truly".split(),
        "completely so totally utterly".split(),
        "fairly mostly quite rather".split(),
    ),
    **_toned(
        "adverb",
        "beautifully brilliantly cleverly gracefully perfectly splendidly wonderfully".split(),
        "badly crudely horribly miserably painfully stupidly terribly".split(),
        "digitally quickly quietly slowly".split(),
    ),
    **_toned(
        "thing",
        "a delight/a joy/a marvel/a masterpiece/a pleasure/a success/a treat/a triumph".split("/"),
        "a catastrophe/a disaster/a disgrace/a failure/a fiasco/a mess/a shame/a waste".split("/"),
        "a debut/a musical/a remake/an experiment".split("/"),
    ),
    **_toned(
        "liked",
        "admired adored enjoyed loved praised treasured".split(),
        "despised disliked dreaded hated loathed regretted".split(),
        "discussed expected remembered reviewed".split(),
    ),
    **_toned(
        "reacted",
        "applauded celebrated cheered laughed rejoiced smiled".split(),
        "complained cried despaired sobbed suffered wept".split(),
        "listened talked waited whispered".split(),
    ),
    **_toned(
        "moved",
        "amazed delighted fascinated happy impressed inspired thrilled".split(),
        "angry appalled ashamed depressed disappointed disgusted sad".split(),
        "awake cold hungry speechless".split(),
    ),
    **_toned(
        "earned",
        "admiration affection applause gratitude praise respect".split(),
        "anger blame contempt criticism hatred ridicule".split(),
        "attention money time".split(),
    ),
}

# codespell:ignore-begin: the reviews stay as they are
_WORDS: dict[str, tuple[str, ...]] = {
    "one": tuple(
        """acting camera cast climax dialogue direction editing ending finale lighting location makeup music narration
        opening pacing photography plot premise rhythm scenery score script setting soundtrack staging story
        translation""".split()
    ),
    "many": tuple(
        """actors animals backdrops chapters characters colours costumes dancers drawings lyrics monologues
        performances portraits scenes sets shadows songs visuals voices""".split()
    ),
    "stuff": ("acting", "dialogue", "editing", "lighting", "music", "pacing", "photography", "{many}"),
    "film": tuple("adaptation documentary drama film movie musical picture remake sequel version western".split()),
    "a_film": tuple("documentary drama film movie musical picture remake sequel western".split()),
    "maker": tuple(
        "author composer crew designer director editor narrator painter producer studio team writer".split()
    ),
    "kin": tuple(
        "aunt brother colleague cousin daughter father husband mother neighbour sister son uncle wife".split()
    ),
    "crowd": tuple("audience children crowd family guests people room students theatre visitors".split()),
    "made": tuple(
        """arranged assembled chosen composed designed developed done handled made planned presented produced
        realised""".split()
    ),
    "i": ("I", "We"),
    "me": ("me", "us", "everyone", "my {kin}"),
    "this": ("this", "the"),
    "is": ("is", "was"),
    "end": (".", ".", ".", "!"),
    "saw": tuple("borrowed finished rented saw streamed watched".split()),
    "thought": tuple("believed felt found said thought".split()),
    "where": ("at home", "in the cinema", "last week", "on Sunday", "on a plane", "with my {kin}", "yesterday"),
    "frame": (
        "In my view",
        "From the start",
        "On the big screen",
        "At the second viewing",
        "After the first hour",
        "In the second half",
    ),
    "part": ("every scene", "each minute", "the whole thing", "all of it", "it", "the {one}", "the {many}"),
}
# codespell:ignore-end

_SENTENCES: dict[str, tuple[str, ...]] = {
    "state": ("{adj}", "{very} {adj}", "{adj} and {adj}", "{adverb} {made}"),
    # The first four words of an opener hold no punctuation and no slot of tone: they are the prompt.
    "opener": (
        "The {one} in {this} {film} was {state}{end}",
        "The {many} in {this} {film} were {state}{end}",
        "The {one} of {this} {film} was {thing}{end}",
        "{i} {thought} the {one} was {state}{end}",
        "{i} {thought} the {many} were {state}{end}",
        "My {kin} {thought} the {one} was {state}{end}",
        "For me the {one} was {state}{end}",
        "{frame} the {one} was {state}{end}",
        "{i} {saw} {this} {film} {where} and {liked} it{end}",
        "{i} {saw} {this} {film} {where} and it was {thing}{end}",
        "{i} {saw} {this} {film} {where} and left {moved}{end}",
        "This {is} a {a_film} with {adj} {stuff}{end}",
        "It {is} a {a_film} with {very} {adj} {stuff}{end}",
        "The {maker} of {this} {film} has made {thing}{end}",
        "The {maker} of {this} {film} earned {earned}{end}",
    ),
    "follow": (
        "The {one} was {state}{end}",
        "The {many} were {state}{end}",
        "The {one} was {adj} and {thing}{end}",
        "Overall, the {one} was {state}{end}",
        "In short, it was {thing}{end}",
        "What {thing} it was!",
        "{i} {liked} it and left {moved}{end}",
        "My {kin} {liked} {part}{end}",
        "The {crowd} {reacted}{end}",
        "The {crowd} {reacted} and left {moved}{end}",
        "It left {me} {moved}{end}",
        "It has {very} {adj} {stuff}{end}",
        "The {maker} earned {earned} and {earned}{end}",
    ),
    "sentence": ("{opener}", "{follow}"),
}

RULES: dict[str, tuple[str, ...]] = {**_TONED, **_WORDS, **_SENTENCES}

# Literal text at even places, slot names at odd ones, so that sampling needs no pattern matching.
_PARTS = {slot: tuple(tuple(SLOT.split(form)) for form in forms) for slot, forms in RULES.items()}


def resolve(slot: str, tone: str) -> str:
    """The rule of a slot in a sentence of that tone."""
    return slot if slot in RULES else f"{slot}_{tone}"


def write_review(mood: str, rng: Random) -> str:
    """An opener and one or two further sentences, each with a tone drawn by the mood."""
    slots = ("opener", *("follow",) * rng.randint(1, 2))
    return " ".join(sample(slot, rng.choices(TONES, MOODS[mood])[0], rng) for slot in slots)


def sample(slot: str, tone: str, rng: Random) -> str:
    """Write one text of a slot; all alternatives of a rule are equally likely."""
    # Faster than `choice`; this line decides how long the corpus takes.
    forms = _PARTS[resolve(slot, tone)]
    parts = forms[int(rng.random() * len(forms))]
    return "".join(sample(part, tone, rng) if place % 2 else part for place, part in enumerate(parts))


def pattern(slot: str, tone: str) -> str:
    """A regular expression that matches exactly the texts of a slot in a sentence of that tone."""
    forms = []
    for form in RULES[resolve(slot, tone)]:
        parts = SLOT.split(form)
        forms.append("".join(pattern(part, tone) if place % 2 else re.escape(part) for place, part in enumerate(parts)))
    return f"(?:{'|'.join(forms)})"


@cache
def _sentence() -> re.Pattern[str]:
    return re.compile("|".join(pattern("sentence", tone) for tone in TONES))


def accepts(sentence: str) -> bool:
    """Whether the grammar can write this sentence, punctuation included."""
    return _sentence().fullmatch(sentence) is not None


def grammatical_share(text: str) -> float:
    """The share of a text's sentences that the grammar accepts, 0 for an empty text.

    An unfinished tail counts as a sentence that is not accepted.
    """
    # Every sentence but the first comes with the space before it; one more space in front makes all alike.
    sentences = re.findall(r"[^.!]*[.!]|[^.!]+", f" {text}") if text else []
    accepted = sum(part[0] == " " and accepts(part[1:]) for part in sentences)
    return accepted / len(sentences) if sentences else 0.0


def grammar_reward(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """`grammatical_share` of prompt + response, as a reward function."""
    return [grammatical_share(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
