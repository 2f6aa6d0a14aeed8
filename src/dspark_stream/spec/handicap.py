"""How much longer rounds with drafts take than the capacity curve says, against rounds without: learnt from rounds.

Whether drafting pays hangs on a few percent, and a curve that was measured in seconds, on streams that nobody reads, is
not that exact: committing accepted tokens takes longer than committing none, other passes leave other things in the
processor's caches, and how much of that a measurement meets is chance. What counts is one ratio at the number of
streams of the moment. A machine that is slow as a whole does not move it, once plain rounds have shown that.
"""

from __future__ import annotations

from math import exp, log
from statistics import fmean
from typing import NamedTuple

from dspark_stream.spec.capacity import Costs

MEMORY = 32
"""Rounds of a kind after which what was seen counts half as much (e-fold)."""
SURPRISE = 0.15
"""Of one round's deviation, as a logarithm, so much is believed: a round that was interrupted moves little."""
MOST = 0.25
"""A handicap beyond this, as a logarithm, is not believed: it would end drafting, and with it what could correct it."""
PLAIN_AFTER = 512
"""Rounds with drafts of a number of streams after which plain ones are wanted again, to hold the others against; other
numbers of streams go by them no longer."""
FADES_IN, LEAST_COUNT = 512, 4
"""Plain rounds in which what is known of rounds with drafts counts less by the factor e, down to so many rounds: only
probes, which are rare, tell of a machine that has changed meanwhile.
"""
ELSEWHERE_COUNTS_AS = 8.0
"""Rounds with drafts from which on a number of streams is judged more by its own than by all numbers together."""


class Shape(NamedTuple):
    """A round as costs know it."""

    streams: int
    position: float
    drafting: int
    slots: int
    batch_tokens: int

    def ms(self, costs: Costs) -> float:
        """What it should take."""
        return costs.round_cost(self.streams, self.position, self.drafting, self.slots)(self.batch_tokens)


class _Mean:
    """A mean that forgets and that single values move little."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0.0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1.0, MEMORY)
        step = max(-SURPRISE, min(SURPRISE, value - self.value))
        self.value += step / self.count

    def fade(self) -> None:
        self.count = max(self.count * (1.0 - 1.0 / FADES_IN), min(self.count, LEAST_COUNT))


class Handicap:
    """One for an engine."""

    def __init__(self) -> None:
        self._plain: dict[int, _Mean] = {}
        """Measured over expected time of plain rounds, as logarithms, by number of streams."""
        self._drafted: dict[int, _Mean] = {}
        """The same of rounds with drafts, less what plain ones take longer at the time."""
        self._anywhere = _Mean()
        self._just_drafted: set[int] = set()
        self._since_plain: dict[int, int] = {}
        self._last: dict[tuple[int, bool], Shape] = {}
        """The last round of each kind."""

    def rebase(self, before: Costs, after: Costs) -> None:
        """What rounds are expected to take has changed: hold what they took against that."""

        def shift(streams: int, drafted: bool) -> float:
            shape = self._last[streams, drafted]
            return log(shape.ms(before) / shape.ms(after))

        plain = {streams: shift(streams, False) for streams in self._plain}
        for streams, mean in self._plain.items():
            mean.value += plain[streams]
        shifts = {streams: shift(streams, True) - plain[streams] for streams in self._drafted}
        for streams, mean in self._drafted.items():
            mean.value += shifts[streams]
        self._anywhere.value += fmean(shifts.values()) if shifts else 0.0

    def see(self, shape: Shape, ms: float, expected_ms: float) -> None:
        """A whole round's measured and expected milliseconds."""
        streams, drafted = shape.streams, shape.drafting > 0
        if ms <= 0 or expected_ms <= 0:
            return
        self._last[streams, drafted] = shape
        deviation = log(ms / expected_ms)
        if drafted:
            self._since_plain[streams] = self._since_plain.get(streams, 0) + 1
            known = self._plain.get(streams)
            if known is not None:
                self._drafted.setdefault(streams, _Mean()).add(deviation - known.value)
                if self._since_plain[streams] <= PLAIN_AFTER:  # what others go by is held against what was seen lately
                    self._anywhere.add(deviation - known.value)
            self._just_drafted.add(streams)
            return
        for fading in (self._drafted.get(streams), self._anywhere):
            if fading is not None:
                fading.fade()
        if streams in self._just_drafted:  # it still pays for what drafting drove out of the caches
            self._just_drafted.remove(streams)
            return
        self._plain.setdefault(streams, _Mean()).add(deviation)
        self._since_plain[streams] = 0

    def wants_plain(self, streams: int, margin: float) -> bool:
        """Whether a few plain rounds of so many streams would tell more than they cost.

        ``margin``: the throughput that drafts promise over what they would have to, with no handicap counted. Where the
        worst that is believed would not undo it, there is nothing to find out.
        """
        if margin > exp(MOST):
            return False
        return streams not in self._plain or self._since_plain[streams] >= PLAIN_AFTER

    def factor(self, streams: int) -> float:
        """By what a round with drafts takes longer than expected where a plain one takes what is expected."""
        own = self._drafted.get(streams)
        weight = 0.0 if own is None else own.count / (own.count + ELSEWHERE_COUNTS_AS)
        mine = weight * own.value if own is not None else 0.0
        return exp(max(-MOST, min(MOST, mine + (1 - weight) * self._anywhere.value)))
