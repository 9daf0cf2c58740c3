"""What ends a response: the one home of this notion, for rollout, SFT, reward models, chat, evaluation and export."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedTokenizerBase

from src.models.chat_template import own_template, render

PROBE = "(answer)"  # stands for an answer, to find out what a chat template writes around one
ASKED = [{"role": "user", "content": "(question)"}]


@dataclass(frozen=True)
class Endings:
    """The tokens that end a response, and the one that a text is closed with: `turn` after a chat, `eos` otherwise."""

    ids: frozenset[int]  # each of them ends a response
    eos: int  # of the tokenizer
    turn: int | None  # the special token that the chat template writes after an answer; None without any
    signs: tuple[str, ...] = ()  # of a chat: the opening of an answer, the end of a turn
    after: str = ""  # all that the chat template writes after an answer

    def closed(self, row: list[int], text: str) -> list[int]:
        """The token ids of a text, ended by exactly one of these tokens."""
        if row and row[-1] in self.ids:
            return row
        chat = any(sign in text for sign in self.signs)
        return [*row, self.turn if self.turn is not None and chat else self.eos]

    def without_end(self, row: list[int]) -> list[int]:
        """The token ids of a response without the token that ends it, if one does."""
        return row[:-1] if row and row[-1] in self.ids else row


def endings(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None = None) -> Endings:
    """What ends a response: the tokenizer's end token, the turn's end in its chat template, and what the model names.

    The turn's end is read off a rendered answer, as the first special token after it.
    """
    named = None if generation is None else generation.eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [] if named is None else [named])}
    after, opening = around_an_answer(tokenizer)
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | {*tokenizer.all_special_tokens}
    end = min((token for token in special if token in after), key=lambda t: (after.index(t), -len(t)), default=None)
    if end is None:
        return Endings(frozenset(ids), tokenizer.eos_token_id, None)
    turn = tokenizer.convert_tokens_to_ids(end)
    signs = (end, opening) if opening else (end,)
    return Endings(frozenset({*ids, turn}), tokenizer.eos_token_id, turn, signs, after)


def around_an_answer(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes after an answer, and what it opens one with; empty where it writes no such chat."""
    template = own_template(tokenizer)
    if template is None:
        return "", ""
    try:
        answered, asked, opened = (
            render(template, [*ASKED, *answer], opens, tokenizer)
            for answer, opens in (([{"role": "assistant", "content": PROBE}], False), ([], False), ([], True))
        )
    except Exception:  # a template may raise anything; data that go through it say so
        return "", ""
    opening = opened.removeprefix(asked).strip() if opened.startswith(asked) else ""
    return answered.rpartition(PROBE)[2] if PROBE in answered else "", opening
