"""Drafts that cost nothing: what followed the last time that a stream's own text went like this.

Edited code, quoted passages and lists repeat themselves. The longest suffix of a stream's prompt and text that occurs
before is found, and what came after it is proposed (elsewhere: prompt lookup decoding, n-gram speculation). Such a
draft is a function of what is committed. So q = 1, and any schedule for it is lossless under every verification.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

LEAST = 3
"""Tokens that have to be the same at least."""
COMPARED = 32
"""Tokens of a suffix that are compared at most; longer matches are no better."""
PLACES = 8
"""Latest places of the last `LEAST` tokens that are compared."""
BITS = 21
"""Of a token in a run; no vocabulary is larger."""
RUN = (1 << LEAST * BITS) - 1
LONGEST = 15
"""Tokens that are proposed at most: with the anchor sixteen rows."""


class Found(NamedTuple):
    """A draft of its own text for one stream."""

    tokens: list[int]
    """x_1 … x_g, at least one and at most `LONGEST`."""
    matched: int
    """Tokens before them that were the same, `LEAST` … `COMPARED`."""


class Lookup:
    """The tokens of one stream so far, and the places of every `LEAST` of them in a row."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._latest: dict[int, int] = {}
        """Position after the latest place of every run of `LEAST` tokens; of the last run not yet."""
        self._earlier = array("i", [0] * LEAST)
        """For each such position, the one of the place before it; 0: none. An array of numbers, not lists: a prompt has
        thousands of places, and the garbage collector would visit every list."""
        self._run = self._place = 0
        """The last run as one number, and the position after its latest place before; 0: none."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that were read or committed."""
        text, latest, run, before = self._tokens, self._latest, self._run, self._place
        for token in tokens:
            if (place := len(text)) >= LEAST:
                self._earlier.append(before)
                latest[run] = place
            text.append(token)
            run = (run << BITS | token) & RUN
            before = latest.get(run, 0)
        self._run, self._place = run, before

    def find(self, most: int) -> Found | None:
        """What followed the longest suffix that occurs before, of equally long ones the latest; None: there is none.

        ``most``: tokens that are wanted, at least one.
        """
        if not (place := self._place):
            return None
        text = self._tokens
        end = len(text)
        best, matched = 0, 0
        for _ in range(PLACES):
            if not place:
                break
            same, furthest = LEAST, min(COMPARED, place)
            while same < furthest and text[place - 1 - same] == text[end - 1 - same]:
                same += 1
            if same > matched:
                best, matched = place, same
                if same == COMPARED:
                    break
            place = self._earlier[place]
        return Found(text[best : best + min(most, LONGEST)], matched)
