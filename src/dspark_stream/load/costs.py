"""What a round takes: the capacity curve, corrected by what rounds really take.

Two things are told apart:

- The *pace*: how much longer all rounds take, for a neighbour on the machine or a lower clock. It scales milliseconds,
  and changes no choice between rounds.
- The *corrections*: how much longer rounds of one size take than the curve says, or rounds with drafts. Every choice
  depends on them. They are learnt only when a round follows a different one, since both then met the same machine.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from math import exp, log
from typing import NamedTuple

import numpy as np

from dspark_stream.load.curve import Array, CapacityCurve, Company

GAIN = 0.1
"""Share of a surprise that is learnt: of a change between two rounds, beyond what was expected."""
PRIOR = 2
"""The measured curve counts as much as so many changes."""
COMPARED = 3
"""Rounds of a run, the first left out, that are compared with the last round before it. A look has so many."""
MOST = 0.5
"""No change counts for more than this, as a logarithm: a round may have been interrupted."""
STEP = 16
"""Numbers of looked-up tokens are rounded up to a multiple of this, so that costs can be cached."""


class RoundCost:
    """One round's milliseconds as a function of B, from ``first`` = R tokens on. All else is fixed."""

    def __init__(self, first: int, ms: Sequence[float]) -> None:
        self.first = first
        self.ms = list(ms)
        self._hull: RoundCost | None = None

    def __call__(self, batch_tokens: int) -> float:
        """Milliseconds at B."""
        return self.ms[batch_tokens - self.first]

    def within(self, slowest_ms: float) -> RoundCost:
        """The same, but sizes that take more than ``slowest_ms`` cost so much that none is chosen; B = R stays."""
        if max(self.ms) <= slowest_ms:
            return self
        return RoundCost(self.first, [self.ms[0], *(ms if ms <= slowest_ms else 1e9 for ms in self.ms[1:])])

    @property
    def hull(self) -> RoundCost:
        """The greatest convex function below it: without steps, on which an admission with early stop gets stuck."""
        if self._hull is None:
            self._hull = RoundCost(self.first, convex(self.ms))
        return self._hull


class Shape(NamedTuple):
    """A round as costs know it."""

    company: Company
    drafting: int
    slots: int
    batch_tokens: int


class _Seen(NamedTuple):
    size: int
    drafting: int
    over: float
    """Logarithm of what it took over what the curve said."""


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
        self._new_by_size, self._new_by_drafting = self._by_size.copy(), self._by_drafting.copy()
        """What was learnt since the last `settle`."""
        self._known, self._known_drafting = [0] * len(curve.tokens), [0] * len(self._drafted_for)
        """Changes that each of them was learnt from."""
        self._pace = 0.0
        self._last: _Seen | None = None
        self._rounds = 0
        """Of the run of rounds of one sort, with drafts or without, that the last one belongs to."""
        self._before: _Seen | None = None
        """What ended the run before."""
        self._plain = lru_cache(maxsize=256)(self._plain_ms)
        self._costs = lru_cache(maxsize=256)(self._cost)

    @property
    def pace(self) -> float:
        """How many times as long all rounds take as was measured."""
        return exp(self._pace)

    # --- asking ------------------------------------------------------------------------------------------------

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
        return self._plain(_near(company))

    def round_cost(self, company: Company, drafting: int, slots: int, looked_up: int = 0) -> RoundCost:
        """What a round costs, for every B that it could have; ``looked_up``: tokens that may be verified besides."""
        return self._costs(_near(company), drafting, slots, -(-looked_up // STEP) * STEP)

    def ms(self, shape: Shape) -> float:
        """One round."""
        company, drafting, slots, batch_tokens = shape
        return self.round_cost(company, drafting, slots, batch_tokens - company.streams)(batch_tokens)

    def _correction(self, batch_tokens: Array) -> Array:
        return np.interp(np.log(batch_tokens), self._sizes, self._by_size)

    def _plain_ms(self, company: Company) -> float:
        return self._cost(company, 0, 0, 0).ms[0]

    def _cost(self, company: Company, drafting: int, slots: int, looked_up: int) -> RoundCost:
        tokens = np.arange(company.streams, company.streams + drafting * slots + looked_up + 1, dtype=float)
        if drafting:
            ms = self.round_ms(company, tokens, np.array(drafting), np.array(slots))
        else:
            ms = self.curve.pass_ms(tokens, company) + self.curve.beside_ms(company.streams)
            ms = ms * np.exp(self._correction(tokens))
        return RoundCost(company.streams, ms.tolist())

    # --- learning ----------------------------------------------------------------------------------------------

    def learn(self, shape: Shape, ms: float) -> None:
        """A whole round's measured milliseconds."""
        size = _nearest(self.curve.tokens, shape.batch_tokens)
        drafting = 1 + _nearest(self._drafted_for, shape.drafting) if shape.drafting else 0
        told = float(self._by_size[size]) + (float(self._by_drafting[drafting - 1]) if drafting else 0.0)
        seen = _Seen(size, drafting, log(ms / self.ms(shape)) + told)
        self._pace += GAIN * max(-MOST, min(MOST, self._beyond(seen) - self._pace))
        if self._last is not None and bool(self._last.drafting) != bool(drafting):
            self._before, self._rounds = self._last, 0
        last, self._last = self._last, seen
        self._rounds += 1
        if self._rounds > 1 and last is not None:  # the first of a run finds caches that other rounds have filled
            if (last.size, last.drafting) != (size, drafting):
                self._change(last, seen)
            if self._before is not None and self._rounds <= COMPARED:
                self._change(self._before, seen)

    def _beyond(self, seen: _Seen) -> float:
        """How much longer a round took than expected of such rounds, as a logarithm."""
        known = self._by_size[seen.size] + self._new_by_size[seen.size]
        if seen.drafting:
            known += self._by_drafting[seen.drafting - 1] + self._new_by_drafting[seen.drafting - 1]
        return seen.over - float(known)

    def _change(self, before: _Seen, after: _Seen) -> None:
        surprise = max(-MOST, min(MOST, self._beyond(after) - self._beyond(before)))
        if bool(before.drafting) == bool(after.drafting):
            known = [self._known[before.size], self._known[after.size]]
            by = max(GAIN, 1 / (PRIOR + min(known))) * surprise
            share = (1 + known[0]) / (2 + sum(known))  # of the two sizes, the one that is known less is corrected more
            self._new_by_size[after.size] += by * share
            self._new_by_size[before.size] += by * (share - 1)
            self._known[before.size] += 1
            self._known[after.size] += 1
        else:
            drafting = max(before.drafting, after.drafting) - 1
            by = max(GAIN, 1 / (PRIOR + self._known_drafting[drafting])) * surprise
            self._new_by_drafting[drafting] += by if after.drafting else -by
            self._known_drafting[drafting] += 1

    def settle(self) -> None:
        """Put what was learnt into the answers. Until then answers do not change, and can be cached."""
        if self._new_by_size.any() or self._new_by_drafting.any():
            self._by_size += self._new_by_size
            self._by_drafting += self._new_by_drafting
            self._new_by_size[:] = self._new_by_drafting[:] = 0.0
            self._plain.cache_clear()
            self._costs.cache_clear()


def _nearest(sizes: Sequence[int], size: int) -> int:
    i = min(bisect_left(sizes, size), len(sizes) - 1)
    return i - 1 if i and size - sizes[i - 1] < sizes[i] - size else i


def _near(company: Company) -> Company:
    """The company under which costs are cached: position by steps of 32, the share by sixteenths."""
    streams, position, sampled = company
    return Company(streams, 32 * round(position / 32), round(16 * sampled) / 16)


def convex(values: Sequence[float]) -> list[float]:
    """The greatest convex sequence below ``values`` (their lower hull)."""
    corners: list[int] = []
    for i, value in enumerate(values):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (values[b] - values[a]) * (i - b) < (value - values[b]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    hull = np.interp(np.arange(len(values)), corners, [values[i] for i in corners])
    return [float(v) for v in hull]
