"""What looked-up drafts promise: how often a text goes on as it did before, by the length of the match.

Every round teaches it, whether or not the draft was used, by the tokens that were committed. Only past rounds are used.
"""

from __future__ import annotations

from collections.abc import Sequence

from dspark_stream.decoding.lookup import COMPARED, Found

KINDS = COMPARED.bit_length() + 1
"""Lengths of a match are told apart by powers of two; there are so many."""
LEAN = 16.0  # surprise a token 0.488 nats; 4: 0.494, 32: 0.489 (SmolLM2, temperature 0.7; decision 037)
"""After so many looked-up tokens a stream is judged half by itself and half by all streams."""
FADE = 1 / 64
"""Share that every token makes forget of what all streams showed; of a stream's own, twice as much."""
HOPE = 0.5  # 0.7: +0.2 %, 0.85: +0.2 % of replays' throughput, where the drafter's promises begin with it
"""What is believed of a token, given those before it, before anything was seen."""


class Repeats:
    """Of one stream, or of all of them."""

    def __init__(self, fade: float = 2 * FADE) -> None:
        self._fade = fade
        self._same = [0.0] * KINDS
        self._seen = [0.0] * KINDS

    def share(self, kind: int, otherwise: float) -> float:
        """Share of tokens after so long a match that were the same; ``otherwise`` counts as much as `LEAN` tokens."""
        return (self._same[kind] + LEAN * otherwise) / (self._seen[kind] + LEAN)

    def learn(self, found: Found, committed: Sequence[int]) -> None:
        """Compare what was committed with what had been found."""
        keep = 1 - self._fade
        for k, (token, proposed) in enumerate(zip(committed, found.tokens, strict=False)):
            kind = _kind(found.matched + k)
            self._seen[kind] = keep * self._seen[kind] + 1.0
            self._same[kind] = keep * self._same[kind] + (token == proposed)
            if token != proposed:
                return


def confidence(own: Repeats, pool: Repeats, found: Found) -> list[float]:
    """c_1, c_2, …: every accepted token makes the match longer by one."""
    kinds = [_kind(found.matched + k) for k in range(len(found.tokens))]
    shares = {kind: own.share(kind, pool.share(kind, HOPE)) for kind in dict.fromkeys(kinds)}
    return [shares[kind] for kind in kinds]


def _kind(matched: int) -> int:
    return min(matched, COMPARED).bit_length()
