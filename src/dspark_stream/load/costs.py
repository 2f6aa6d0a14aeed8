"""What a round takes: the capacity curve, corrected by what rounds really take.

Two neighbouring rounds met the same machine. So where they are of different kinds, what their times differ by beyond
what the curve says corrects it: there is a correction for each size of a pass, and one for drafting for so many
streams. What all rounds have in common is the *pace*, say of a neighbour on the machine. It scales milliseconds, and
changes no choice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from math import exp, log
from typing import NamedTuple

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
    over: float
    """Logarithm of what it took over what the curve says."""


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

    def round_ms(self, company: Company, batch_tokens: Array, drafting: Array, slots: Array) -> Array:
        """Rounds over so many tokens that draft so many slots for so many streams, at least one; all broadcast."""
        c = self.curve
        beside = c.drafting_ms(drafting, slots, company) + c.beside_ms(company.streams)
        by_drafting = np.interp(np.log(drafting), self._streams, self._by_drafting)
        ms: Array = (c.pass_ms(batch_tokens, company) + beside) * np.exp(self._correction(batch_tokens) + by_drafting)
        return ms

    def pass_ms(self, batch_tokens: Array, company: Company) -> Array:
        """Target passes over so many tokens, alone."""
        ms: Array = self.curve.pass_ms(batch_tokens, company) * np.exp(self._correction(batch_tokens))
        return ms

    def plain_ms(self, company: Company) -> float:
        """A round without drafts."""
        return self.round_cost(company, 0, 0).ms[0]

    def round_cost(self, company: Company, drafting: int, slots: int, looked_up: int = 0) -> RoundCost:
        """What a round costs, for every B that it could have; ``looked_up``: tokens that may be verified besides."""
        streams, position, sampled = company
        near = Company(streams, 32 * round(position / 32), round(16 * sampled) / 16)  # so that answers are found again
        return self._costs(near, drafting, slots, looked_up)

    def ms(self, shape: Shape) -> float:
        """One round."""
        company, drafting, slots, batch_tokens = shape
        looked_up = max(0, batch_tokens - company.streams - drafting * slots)
        return self.round_cost(company, drafting, slots, looked_up)(batch_tokens)

    def _cost(self, company: Company, drafting: int, slots: int, looked_up: int) -> RoundCost:
        last = company.streams + drafting * slots + looked_up
        tokens = np.arange(company.streams, last + 1, dtype=float)
        if drafting:
            ms = self.round_ms(company, tokens, np.array(drafting), np.array(slots))
        else:
            beside_ms = self.curve.beside_ms(company.streams)
            ms = self.pass_ms(tokens, company) + beside_ms * np.exp(self._correction(tokens))
        return RoundCost(company.streams, ms.tolist())

    def learn(self, shape: Shape, ms: float) -> None:
        """A whole round's measured milliseconds."""
        size = _nearest(self.curve.tokens, shape.batch_tokens)
        drafting = _nearest(self._drafted_for, shape.drafting) if shape.drafting else -1
        seen = _Seen(size, drafting, 0.0)
        seen = seen._replace(over=log(ms / self.ms(shape)) + self._known(seen))
        last, self._last = self._last, seen
        self._pace += GAIN * _bounded(self._beyond(seen) - self._pace)
        if last is None or last[:2] == seen[:2]:
            return
        surprise = GAIN * _bounded(self._beyond(seen) - self._beyond(last))
        if (last.drafting < 0) == (drafting < 0):
            self._by_size[size] += surprise / 2
            self._by_size[last.size] -= surprise / 2
        else:
            self._by_drafting[max(last.drafting, drafting)] += surprise if drafting >= 0 else -surprise
        self._costs.cache_clear()

    def rest(self) -> None:
        """Time goes by without rounds: the next one has no neighbour."""
        self._last = None

    def _correction(self, batch_tokens: Array) -> Array:
        return np.interp(np.log(batch_tokens), self._sizes, self._by_size)

    def _known(self, seen: _Seen) -> float:
        return float(self._by_size[seen.size] + (self._by_drafting[seen.drafting] if seen.drafting >= 0 else 0.0))

    def _beyond(self, seen: _Seen) -> float:
        """How much longer a round took than is expected of such rounds, as a logarithm."""
        return seen.over - self._known(seen)


def _bounded(surprise: float) -> float:
    return max(-MOST, min(MOST, surprise))


def _nearest(sizes: Sequence[int], size: int) -> int:
    i = min(bisect_left(sizes, size), len(sizes) - 1)
    return i - 1 if i and size - sizes[i - 1] < sizes[i] - size else i
