"""What looked-up drafts are worth: how often a text goes on as it did before, by how much of it was the same.

Learnt for nothing in every round, whether or not the draft was used: the tokens that were committed tell. Only past
rounds go in.
"""

from __future__ import annotations

from collections.abc import Sequence

from dspark_stream.decoding.lookup import COMPARED, Found

KINDS = COMPARED.bit_length() + 1
"""Numbers of matched tokens that are told apart, by their bits."""
LEAN = 8.0
"""Blocks, or looked-up tokens, of its own from which on a stream is judged more by itself than by all streams."""
FADE = 1 / 64
"""Of what was seen of all streams, and twice of a stream's own, so much is forgotten with every token."""
HOPE = 0.5
"""What is believed of a token, given those before it, before anything was seen."""


class Repeats:
    """Of one stream, or of all of them."""

    def __init__(self, fade: float = 2 * FADE) -> None:
        self._fade = fade
        self._same = [0.0] * KINDS
        self._seen = [0.0] * KINDS

    def share(self, kind: int, otherwise: float) -> float:
        """Of the tokens after so long a match, those that were the same; leaning on what to think ``otherwise``."""
        return (self._same[kind] + LEAN * otherwise) / (self._seen[kind] + LEAN)

    def learn(self, found: Found, committed: Sequence[int]) -> None:
        """Hold what was committed against what had been found."""
        keep = 1 - self._fade
        for k, (token, proposed) in enumerate(zip(committed, found.tokens, strict=False)):
            kind = _kind(found.matched + k)
            self._seen[kind] = keep * self._seen[kind] + 1.0
            self._same[kind] = keep * self._same[kind] + (token == proposed)
            if token != proposed:
                return


def confidence(own: Repeats, pool: Repeats, found: Found) -> list[float]:
    """c_1, c_2, …: every token that stands makes the match longer by one."""
    kinds = [_kind(found.matched + k) for k in range(len(found.tokens))]
    shares = {kind: own.share(kind, pool.share(kind, HOPE)) for kind in dict.fromkeys(kinds)}
    return [shares[kind] for kind in kinds]


def _kind(matched: int) -> int:
    return min(matched, COMPARED).bit_length()
