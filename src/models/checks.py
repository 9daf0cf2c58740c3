"""What can be wrong with tokens and gradients of the roles."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from src.models.endings import around_an_answer, endings
from src.models.fingerprint import tokenizer_fingerprint
from src.models.roles import Roles
from src.utils.check import Check, checked

NAMED = 3  # parameters that a sentence names


def padding_token(roles: Roles, prompts: Sequence[Sequence[int]]) -> Check:
    """Whether the padding token has an embedding and stands in no prompt (token ids that count); end tokens may pad."""
    pad, tokenizer = roles.tokenizer.pad_token_id, roles.tokenizer
    with roles.acting("policy") as lm:
        rows = lm.get_input_embeddings().weight.shape[0]
    inside = pad is not None and 0 <= pad < rows
    within = 0 if pad in roles.endings.ids else sum(pad in row for row in prompts)
    found = f"{tokenizer.pad_token!r} (id {pad} of {rows}), in {within} of {len(prompts)} prompts"
    mend = "tokenizer.pad_token must be a token that no text holds, or the end token; decoding leaves it out"
    return checked("padding token", found, mend, fault=not inside or within > 0)


def end_tokens(roles: Roles, prompts: Sequence[str]) -> Check:
    """Whether the tokenizer's end token and, for prompts that open an answer in a chat, the turn's end stop a response.

    A fault too: the chat template ends an answer with text that is no special token, which nothing can stop at.
    """
    tokenizer, name = roles.tokenizer, "end tokens"
    with roles.acting("policy") as lm:
        wanted = endings(tokenizer, lm.generation_config)
    after, opening = around_an_answer(tokenizer)
    chats = sum(bool(opening) and prompt.rstrip().endswith(opening) for prompt in prompts)
    shown = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(roles.endings.ids))
    found = f"{shown} {'ends' if len(roles.endings.ids) == 1 else 'end'} a response; {chats} of {len(prompts)} prompts "
    found += "open an answer in a chat"
    lacking = sorted(wanted.ids - roles.endings.ids)
    if lacking:
        tokens = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in lacking)
        return Check(name, f"{found}; {tokens} should too", "fault", "give roles.endings all of src.models.endings")
    if chats and after.strip() and wanted.turn is None:
        mend = "make the turn's end a special token of the tokenizer, or choose data.chat_template with one that is"
        return Check(name, f"{found}; the template ends one with {after!r}, no special token", "fault", mend)
    return Check(name, found)


def same_tokenizer(roles: Roles, other: PreTrainedTokenizerBase) -> Check:
    """Whether the data's tokenizer gives the token ids that the roles read."""
    same = tokenizer_fingerprint(roles.tokenizer) == tokenizer_fingerprint(other)
    found = "data and roles have the same" if same else "the data's is another one than the roles'"
    return checked("tokenizer", found, "give the data roles.tokenizer", fault=not same)


def gradients(roles: Roles, role: str, own: list[nn.Parameter]) -> Check:
    """Whether the last backward pass has reached all of `own`, the parameters of a role's optimizer, and no other.

    A few without gradient are a warning, as a batch need not use all experts of a mixture. `roles.parameters()` must
    have had no gradient before the pass.
    """
    names = {id(parameter): name for name, parameter in roles.named_parameters()}
    mine = {id(parameter) for parameter in own}
    frozen = [p for p in own if not p.requires_grad]
    unreached = [p for p in own if p.grad is None or not p.grad.any()]
    broken = [p for p in own if p.grad is not None and not p.grad.isfinite().all()]
    strangers = [p for p in roles.parameters() if id(p) not in mine and p.grad is not None and p.grad.any()]
    kinds = {
        "are frozen": frozen, "got no gradient": unreached, "got one that is not finite": broken,
        "of others got one": strangers,
    }  # fmt: skip
    parts = [
        f"; {len(some)} {what} ({', '.join(names.get(id(p), '?') for p in some[:NAMED])})"
        for what, some in kinds.items()
        if some
    ]
    return checked(
        f"gradient of the {role}",
        f"{len(own) - len(unreached)} of {len(own)} tensors got one" + "".join(parts),
        f"roles.{role}_parameters() must be those that its loss depends on, trainable, and shared with no other role",
        fault=bool(frozen or broken or strangers) or 2 * len(unreached) >= len(own),
        warning=bool(unreached),
    )
