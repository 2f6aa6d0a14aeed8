"""What a round takes: the capacity curve, corrected by what rounds really take.

Two neighbouring rounds met the same machine. So where they are of different kinds, what their times differ by beyond
what the curve says corrects it: there is a correction for each size of a pass, and one for drafting for so many
streams. What all rounds have in common is the *pace*, say of a neighbour on the machine. It scales milliseconds, and
changes no choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import exp, log
from typing import Any, NamedTuple

import numpy as np

from dspark_stream.decoding.schedule import RoundCost
from dspark_stream.load.curve import Array, CapacityCurve, Company

GAIN = 0.2
"""Share of a surprise that is learnt."""
MOST = 0.25
"""No surprise counts for more than this, as a logarithm: a round may have been interrupted."""


class Shape(NamedTuple):
    """A round as costs know it."""

    company: Company
    drafting: int
    slots: int
    batch_tokens: int


class _Seen(NamedTuple):
    size: int
    """Index of its size among those of the curve."""
    drafting: int
    """The same of the streams that were drafted for; -1: none."""
    surprise: float
    """Logarithm of what it took over what was expected."""


class CostTable:
    """Milliseconds of rounds at the pace of the curve. Times `pace` they are those of now. One for an engine."""

    def __init__(self, curve: CapacityCurve) -> None:
        self.curve = curve
        self._drafted_for = curve.streams or [1]
        self._sizes, self._streams = np.log(curve.tokens), np.log(self._drafted_for)
        self._by_size: Array = np.zeros(len(curve.tokens))
        """Corrections of rounds over so many tokens, as logarithms."""
        self._by_drafting: Array = np.zeros(len(self._drafted_for))
        """The same of drafting for so many streams, against no drafts."""
        self._pace = 0.0
        self._last: _Seen | None = None
        self._costs = lru_cache(maxsize=256)(self._cost)

    @property
    def pace(self) -> float:
        """How many times as long all rounds take as was measured."""
        return exp(self._pace)

    def round_ms(self, company: Company, batch_tokens: Array, drafting: Any = 0, slots: Any = 0) -> Array:
        """Rounds over so many tokens that draft so many slots for so many streams; all broadcast."""
        ms = self.curve.pass_ms(batch_tokens, company)
        over = np.interp(np.log(batch_tokens), self._sizes, self._by_size)
        if np.any(drafting):
            ms = ms + self.curve.drafting_ms(drafting, slots)
            over = over + np.interp(np.log(drafting), self._streams, self._by_drafting)
        corrected: Array = ms * np.exp(over)
        return corrected

    def plain_ms(self, company: Company) -> float:
        """A round without drafts."""
        return self.round_cost(company, 0, 0).ms[0]

    def round_cost(self, company: Company, drafting: int, slots: int, looked_up: int = 0) -> RoundCost:
        """What a round costs, for every B that it could have; ``looked_up``: tokens that may be verified besides."""
        near = company._replace(position=32 * round(company.position / 32))  # so that answers are found again
        return self._costs(near, drafting, slots, looked_up)

    def _cost(self, company: Company, drafting: int, slots: int, looked_up: int) -> RoundCost:
        most = company.streams + drafting * slots + looked_up
        ms = self.round_ms(company, np.arange(company.streams, most + 1.0), drafting, slots)
        return RoundCost(company.streams, ms.tolist())

    def ms(self, shape: Shape) -> float:
        """One round."""
        company, drafting, slots, batch_tokens = shape
        looked_up = max(0, batch_tokens - company.streams - drafting * slots)
        return self.round_cost(company, drafting, slots, looked_up)(batch_tokens)

    def learn(self, shape: Shape, ms: float) -> None:
        """A whole round's measured milliseconds."""
        size = _nearest(self.curve.tokens, shape.batch_tokens)
        drafting = _nearest(self._drafted_for, shape.drafting) if shape.drafting else -1
        surprise = log(ms / self.ms(shape))
        last, self._last = self._last, _Seen(size, drafting, surprise)
        self._pace += _learnt(surprise - self._pace)
        if last is None or last[:2] == (size, drafting):
            return
        learnt = _learnt(surprise - last.surprise)
        if (last.drafting < 0) == (drafting < 0):
            self._by_size[size] += learnt / 2
            self._by_size[last.size] -= learnt / 2
        else:
            self._by_drafting[max(last.drafting, drafting)] += learnt if drafting >= 0 else -learnt
        self._costs.cache_clear()

    def rest(self) -> None:
        """Time goes by without rounds: the next one has no neighbour."""
        self._last = None


def _learnt(surprise: float) -> float:
    return GAIN * max(-MOST, min(MOST, surprise))


def _nearest(sizes: Sequence[int], size: int) -> int:
    return min(range(len(sizes)), key=lambda i: abs(sizes[i] - size))
