"""The grammar of the embedded film reviews: one dictionary that both writes sentences and recognises them.

A rule maps a slot to its alternatives, which name other slots in braces. No slot reaches itself, so the language is
finite and one regular expression accepts exactly its sentences. Repeating an alternative raises its probability.

Every sentence has exactly one slot of tone, with words a sentiment lexicon calls good or bad, or does not know:

    tone of a sentence ~ good : bad : plain = 2 : 2 : 1, independently of everything before it.
"""

from __future__ import annotations

import re
from random import Random

SLOT = re.compile(r"\{(\w+)\}")


def _toned(slot: str, good: list[str], bad: list[str], plain: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the four rules of a slot of tone."""
    names = [f"{slot}_good", f"{slot}_bad", f"{slot}_plain"]
    good_slot, bad_slot, plain_slot = (f"{{{name}}}" for name in names)
    weighted = (good_slot, good_slot, bad_slot, bad_slot, plain_slot)
    return {slot: weighted, **{name: tuple(words) for name, words in zip(names, (good, bad, plain), strict=True)}}


_TONES: dict[str, tuple[str, ...]] = {
    **_toned(
        "adj",
        """amazing awesome beautiful brilliant charming delightful elegant excellent fantastic fascinating flawless
        glorious gorgeous great heartfelt impressive inspired lovely magnificent marvelous outstanding perfect
        remarkable splendid stunning superb terrific thrilling wonderful""".split(),
        """awful bad crude depressing disastrous disgusting dismal dreadful horrendous horrible horrid idiotic
        insulting joyless lousy miserable moronic painful pathetic pitiful poor rotten shameful stupid terrible
        ugly weak worthless""".split(),
        """average conventional familiar modern ordinary plain recent standard traditional typical unusual
        usual""".split(),
    ),
    **_toned(
        "adverb",
        """beautifully brilliantly cleverly delightfully gloriously gorgeously gracefully impressively magnificently
        perfectly splendidly supremely wonderfully""".split(),
        """badly crudely disgustingly dreadfully horrendously horribly lamely miserably painfully pathetically
        shamefully stupidly terribly""".split(),
        """digitally gradually mainly mostly plainly quickly quietly slowly visibly""".split(),
    ),
    **_toned(
        "thing",
        """a beauty/a blessing/a champion/a delight/a gift/a joy/a marvel/a masterpiece/a miracle/a pleasure/a success/
        a treat/a triumph/a winner/an honour/an inspiration""".replace("\n        ", "").split("/"),
        """a catastrophe/a disaster/a disgrace/a failure/a fiasco/a flop/a fraud/a horror/a mess/a shame/a tragedy/
        a travesty/a waste/a wreck/an embarrassment/an insult/an outrage""".replace("\n        ", "").split("/"),
        """a cartoon/a debut/a documentary/a drama/a musical/a remake/a sequel/a western/an adaptation/
        an experiment""".replace("\n        ", "").split("/"),
    ),
    **_toned(
        "liked",
        "admired adored appreciated cherished enjoyed loved praised treasured worshipped".split(),
        "abhorred criticized despised disliked dreaded hated loathed regretted".split(),
        "described discussed expected mentioned noticed recorded remembered reviewed studied".split(),
    ),
    **_toned(
        "reacted",
        "applauded celebrated cheered laughed rejoiced smiled triumphed".split(),
        "complained cried despaired panicked sobbed suffered wept".split(),
        "listened talked waited walked whispered yawned".split(),
    ),
    **_toned(
        "moved",
        "amazed delighted ecstatic energized fascinated happy impressed inspired joyful overjoyed thrilled".split(),
        "angry appalled ashamed depressed disappointed disgusted furious miserable outraged sad unhappy".split(),
        "awake cold hungry sleepless speechless thirsty".split(),
    ),
    **_toned(
        "earned",
        "admiration affection applause gratitude praise prizes respect rewards".split(),
        "anger blame contempt criticism hatred punishment rejection ridicule scorn".split(),
        "attention money time".split(),
    ),
}

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
    "very": tuple("absolutely completely really simply so thoroughly totally utterly".split()),
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

_SENTENCES: dict[str, tuple[str, ...]] = {
    "state": ("{adj}", "{very} {adj}", "{adverb} {made}"),
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
        "The {one} was {thing}{end}",
        "Overall, the {one} was {state}{end}",
        "In short, it was {thing}{end}",
        "What {thing} it was!",
        "{i} {liked} {part}{end}",
        "My {kin} {liked} {part}{end}",
        "The {crowd} {reacted}{end}",
        "It left {me} {moved}{end}",
        "It has {adj} {stuff}{end}",
        "The {maker} earned {earned}{end}",
    ),
    "sentence": ("{opener}", "{follow}"),
    "review": ("{opener} {follow}", "{opener} {follow} {follow}"),
}

RULES: dict[str, tuple[str, ...]] = {**_TONES, **_WORDS, **_SENTENCES}

# Literal text at even places, slot names at odd ones: sampling then needs no pattern matching.
_PARTS = {slot: tuple(tuple(SLOT.split(form)) for form in forms) for slot, forms in RULES.items()}


def sample(slot: str, rng: Random) -> str:
    """Write one text of a slot: every alternative of every rule on the way is equally likely."""
    # `choice` costs twice as much, and this line decides how long the corpus takes.
    forms = _PARTS[slot]
    parts = forms[int(rng.random() * len(forms))]
    return "".join(sample(part, rng) if place % 2 else part for place, part in enumerate(parts))


def pattern(slot: str) -> str:
    """Return a regular expression for exactly the texts of a slot."""
    forms = []
    for form in dict.fromkeys(RULES[slot]):
        parts = SLOT.split(form)
        forms.append("".join(pattern(part) if place % 2 else re.escape(part) for place, part in enumerate(parts)))
    return f"(?:{'|'.join(forms)})"
