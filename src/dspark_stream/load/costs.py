"""What a round takes on this machine: the capacity curve, corrected by what rounds really take.

Two neighbouring rounds met the same machine. So where they are of different kinds, what their times differ by beyond
what is expected corrects the curve: each size of a pass, and drafting at each load. What all rounds share is the
*pace*, say of a neighbour. It scales milliseconds, and changes no choice.

Symbols: R streams, B target tokens of a round, p̄ the streams' mean position, γ the draft block's size.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from math import exp, log
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dspark_stream.decoding.schedule import RoundCost

GAIN = 0.2  # 0.1: 0.0 %, 0.4: -0.4 %; least ratio to plain 0.97 all the same (replays, decision 037)
"""Share of a surprise that is learnt."""
MOST = 0.25  # 0.12: 0.0 %; 0.5: -0.2 %, none: -0.5 %, least ratio to plain 0.95 and 0.94
"""No surprise counts for more than this, as a logarithm: a round may have been interrupted."""
LEAST_OF_BASE = 0.25
"""Share of a measured time that is left at least for a shorter context, whose slope may be wrong."""
LOOK = 2  # 1: +0.1 %; 3: -0.3 %, least ratio to plain 0.92
"""Rounds of a look. The last counts: the first finds the processor's caches as other rounds left them."""


class Company(NamedTuple):
    """What the cost of a round depends on, of its streams."""

    streams: int
    position: float
    """p̄: passes cost more the more context they read. Rounded by who asks, so that lists of costs are found again."""


class Shape(NamedTuple):
    """A round as costs know it."""

    company: Company
    drafting: int
    slots: int
    batch_tokens: int


class CapacityCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of drafting (with its context features) and of a target pass with acceptance, linear between points.

    Measured at the start, at one stream that holds ``context`` positions. What else differs is learnt.
    """

    tokens: list[int]
    verify_ms: list[float]  # a pass over that many tokens
    streams: list[int]
    draft_ms: list[float]  # drafting whole blocks for that many streams
    slot_ms: list[float] = []  # of ``draft_ms``, what every slot after the first takes; empty for nothing
    gamma: int
    context: int = 0
    read_us: float = 0.0  # that a position of a stream's context costs a pass, however many rows the stream has
    attend_us: float = 0.0  # that it costs for every row
    feature_us: float = 0.0  # that a position takes whose context features are handed over late

    def pass_ms(self, batch_tokens: Any, company: Company) -> Any:
        """A target pass over B tokens; B may be an array. Beyond the largest that was measured, in proportion."""
        rows = np.asarray(batch_tokens)
        base = np.interp(rows, self.tokens, self.verify_ms) * np.maximum(1.0, rows / self.tokens[-1])
        read_us = self.read_us * (company.streams * company.position - self.context)
        attend_us = self.attend_us * rows * (company.position - self.context)
        return np.maximum(base + 1e-3 * (read_us + attend_us), LEAST_OF_BASE * base)

    def rows(self, batch_tokens: Any, company: Company) -> Any:
        """Rows that such a pass has: here B."""
        return batch_tokens

    def drafting_ms(self, drafting: Any, slots: Any, company: Company) -> Any:
        """Drafting ``slots`` tokens for so many of the streams, at least one; both may be arrays."""
        slot_ms = np.interp(drafting, self.streams, self.slot_ms) if self.slot_ms else 0.0
        spared_ms = slot_ms * (self.gamma - np.asarray(slots))
        return np.maximum(0.0, np.interp(drafting, self.streams, self.draft_ms) - spared_ms)


class CostTable:
    """Milliseconds of rounds at the pace of the curve. Times `pace` they are those of now. One for an engine."""

    def __init__(self, curve: CapacityCurve) -> None:
        self.curve = curve
        self._sizes = [log(tokens) for tokens in curve.tokens]
        self._by_size = [0.0] * len(curve.tokens)  # corrections of rounds over so many tokens, as logarithms
        self._by_drafting: dict[int, float] = defaultdict(float)  # the same of those that draft, by the bits of R
        self._pace, self._drafted, self._run = 0.0, False, 0  # whether the last round drafted, and how many in a row
        # of the last round that counts: size, whether it drafted, the logarithm of its time over what was expected
        self._last: tuple[int, bool, float] | None = None
        self.look_again()

    def look_again(self) -> None:
        """At the curve, which has other times now."""
        self._known, self.drafting_ms = lru_cache(maxsize=128)(self._measured), lru_cache(maxsize=32)(self._drafting)

    @property
    def pace(self) -> float:
        """How many times as long all rounds take as was measured."""
        return exp(self._pace)

    def plain_ms(self, company: Company) -> float:
        """A round without drafts."""
        return self.ms(Shape(company, 0, 0, company.streams))

    def ms(self, shape: Shape) -> float:
        """One round."""
        company, drafting, slots, batch_tokens = shape
        at = batch_tokens - company.streams
        ((ms, times),) = self.passes(company, slice(at, at + 1), drafting > 0)
        return (ms + (drafting and self.drafting_ms(company)[drafting][slots])) * times

    def round_cost(self, company: Company, drafting: int, slots: int, looked_up: int = 0) -> RoundCost:
        """What a round costs, for every B that it could have; ``looked_up``: tokens that may be verified besides."""
        passes = self.passes(company, slice(drafting * slots + looked_up + 1), drafting > 0)
        draft_ms = self.drafting_ms(company)[drafting][slots]
        return RoundCost(company.streams, [(ms + draft_ms) * times for ms, times in passes])

    def passes(self, company: Company, beyond: slice, drafted: bool) -> list[tuple[float, float]]:
        """Passes over R tokens and so many more as measured; and how many times that their whole rounds take."""
        # in plain Python: what a pass has thrown out of the caches, numpy's code too, is slow to come back
        over, more = [*self._by_size, 0.0], self._by_drafting[drafted and company.streams.bit_length()]
        known = self._known(company, 1 << (beyond.stop - 1).bit_length())[beyond]
        return [(ms, exp(more + over[i] + part * (over[i + 1] - over[i]))) for ms, i, part in known]

    def _measured(self, company: Company, count: int) -> list[tuple[float, int, float]]:
        """Of so many passes by B - R: milliseconds, the size that is not larger, how far on it is to the next."""
        rows = np.arange(company.streams, company.streams + count)
        at = np.interp(np.log(self.curve.rows(rows, company)), self._sizes, range(len(self._sizes))).tolist()
        return list(zip(self.curve.pass_ms(rows, company).tolist(), map(int, at), (i % 1 for i in at), strict=True))

    def _drafting(self, company: Company) -> list[list[float]]:
        """Drafting as measured, by streams that are drafted for and slots; 0 for nobody."""
        streams, slots = np.arange(1, company.streams + 1)[:, None], np.arange(self.curve.gamma + 1)
        return [[0.0] * len(slots), *self.curve.drafting_ms(streams, slots, company).tolist()]

    def learn(self, shape: Shape, ms: float) -> None:
        """A whole round's measured milliseconds."""
        size = min(range(len(self._sizes)), key=lambda i: abs(self.curve.tokens[i] - shape.batch_tokens))
        drafted, surprise = shape.drafting > 0, log(ms / self.ms(shape))
        self._pace += GAIN * min(MOST, max(-MOST, surprise - self._pace))
        self._last = self._last if self._run >= LOOK or drafted == self._drafted else None  # kinds took turns since
        self._run, self._drafted = self._run + 1 if drafted == self._drafted else 1, drafted
        if self._run < LOOK:
            return
        last, self._last = self._last, (size, drafted, surprise)
        if last is None or last[:2] == (size, drafted):
            return
        learnt = GAIN * min(MOST, max(-MOST, surprise - last[2]))
        if last[1] != drafted:
            self._by_drafting[shape.company.streams.bit_length()] += learnt if drafted else -learnt
        if last[0] != size:  # half each; smaller sizes go with the smaller, larger ones with the larger
            low, high = self._sizes[last[0]], self._sizes[size]
            for i, at in enumerate(self._sizes):
                self._by_size[i] += learnt * (min(1.0, max(0.0, (at - low) / (high - low))) - 0.5)

    def rest(self) -> None:
        """Time goes by without rounds: the next one has no neighbour."""
        self._last = None
