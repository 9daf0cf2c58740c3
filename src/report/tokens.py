"""The samples of the token view: as many as fit into the page."""

from __future__ import annotations

import json
from itertools import groupby, pairwise
from typing import Any

from src.report.visible import visible

MOST_BYTES = 350_000
QUANTITIES = {  # name in the samples -> title, unit
    "kl": ("KL to the reference", "nats: log pi - log pi_ref of the token, so negative where the reference prefers it"),
    "reward": ("reward", "units of the reward: the score on the last token, the KL term on every one"),
    "value": ("value", "what the critic expected from here on"),
    "advantage": ("advantage", "what the update multiplies the gradient with"),
    "ratio": ("ratio after the update", "pi / pi_old"),
    "logprob": ("log-probability, policy", "nats, of the policy that sampled"),
    "ref_logprob": ("log-probability, reference", "nats"),
    "clipped": ("clipped or not", "1: the loss of this token would now be clipped"),
}


def token_view(samples: list[dict[str, Any]], most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """`tables`: iteration -> its samples; `left_out`: how many of the samples did not fit.

    The first and the last iteration first, then those that halve the gaps; all with the same number of rows.
    """
    tables = [list(rows) for _, rows in groupby(samples, key=lambda row: row.get("iteration", 0))]
    chosen: dict[int, list[dict[str, Any]]] = {}
    rows = max(map(len, tables), default=0)
    while rows:
        chosen, size = {}, 0
        for place in _spread(len(tables)):
            shown = [_shown(row) for row in tables[place][:rows]]
            size += len(json.dumps(shown))
            if size > most_bytes:
                break
            chosen[place] = shown
        if len(chosen) >= min(2, len(tables)):
            break
        rows //= 2
    kept = [{"iteration": tables[place][0].get("iteration", 0), "rows": chosen[place]} for place in sorted(chosen)]
    left_out = len(samples) - sum(len(table["rows"]) for table in kept)
    present = {name for table in kept for row in table["rows"] for name in row["tokens"]}
    quantities = [{"name": n, "title": t, "unit": u} for n, (t, u) in QUANTITIES.items() if n in present]
    return {"tables": kept, "left_out": left_out, "quantities": quantities}


def _spread(count: int) -> list[int]:
    """All places 0..count-1: both ends, then the middle of the largest gap, and so on."""
    order = list(dict.fromkeys([0, count - 1])) if count else []
    while len(order) < count:
        known = sorted(order)
        low, high = max(pairwise(known), key=lambda gap: gap[1] - gap[0])
        order.append((low + high) // 2)
    return order


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    tokens = row.get("tokens") or {}
    return {
        "prompt": visible(str(row.get("prompt", ""))),
        "response": visible(str(row.get("response", ""))),
        "score": row.get("score"),
        "finished": row.get("finished"),
        "tokens": tokens | ({"text": [visible(str(text)) for text in tokens["text"]]} if "text" in tokens else {}),
    }
