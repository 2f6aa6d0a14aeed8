"""Drafts that cost nothing: what followed the last time that a stream's own text went like this.

Edited code, quoted passages and lists repeat themselves. The longest suffix of a stream's prompt and text that stands
there once before is found, and what came after it is proposed (prompt lookup decoding; n-gram speculation elsewhere).
Such a draft is a function of what is committed, so it is drawn with q = 1, and whatever a schedule makes of it is
lossless under every verification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LEAST = 3
"""Tokens that have to be the same at least."""
COMPARED = 32
"""Tokens of a suffix that are compared at most: to be surer than sure changes nothing."""
PLACES = 8
"""Latest places where the last `LEAST` tokens stand that are looked at."""
LONGEST = 15
"""Tokens that are proposed at most: with the anchor sixteen rows."""


class Found(NamedTuple):
    """A draft of its own text for one stream."""

    tokens: list[int]
    """x_1 … x_g, at least one and at most `LONGEST`."""
    matched: int
    """Tokens before them that were the same, `LEAST` … `COMPARED`."""


class Lookup:
    """The tokens of one stream so far, and where every `LEAST` of them in a row stand."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        """Positions after every run of `LEAST` tokens, ascending, at most `PLACES`; of the last run not yet."""

    def extend(self, tokens: Sequence[int]) -> None:
        """These were read or committed."""
        text = self._tokens
        for token in tokens:
            if len(text) >= LEAST:
                places = self._places.setdefault(tuple(text[-LEAST:]), [])
                places.append(len(text))
                if len(places) > PLACES:
                    del places[0]
            text.append(token)

    def find(self, most: int) -> Found | None:
        """What followed the longest suffix that stands here before, of equally long ones the latest; None: none does.

        ``most``: tokens that are wanted, at least one.
        """
        text = self._tokens
        end = len(text)
        best, matched = 0, 0
        for place in reversed(self._places.get(tuple(text[-LEAST:]), ())):
            same, furthest = LEAST, min(COMPARED, place)
            while same < furthest and text[place - 1 - same] == text[end - 1 - same]:
                same += 1
            if same > matched:
                best, matched = place, same
                if same == COMPARED:
                    break
        return Found(text[best : best + min(most, LONGEST)], matched) if matched else None
