"""How much longer rounds with drafts take than the capacity curve says, against rounds without: learnt from rounds.

Whether drafting pays hangs on a few percent, and a curve that was measured in seconds, on streams that nobody reads, is
not that exact: committing accepted tokens takes longer than committing none, other passes leave other things in the
processor's caches, and how much of that a measurement meets is chance. What counts is one ratio at the number of
streams of the moment. A machine that is slow as a whole does not move it, once plain rounds have shown that.
"""

from __future__ import annotations

from math import exp, log

MEMORY = 32
"""Rounds of a kind after which what was seen counts half as much (e-fold)."""
SURPRISE = 0.15
"""Of one round's deviation, as a logarithm, so much is believed: a round that was interrupted moves little."""
MOST = 0.25
"""A handicap beyond this, as a logarithm, is not believed: it would end drafting, and with it what could correct it."""
PLAIN_AFTER, FORGOTTEN_AFTER = 256, 64
"""Rounds with drafts of a number of streams after which plain ones are wanted again, to hold the others against; and
where what plain ones took was forgotten: a restless machine would have us look all the time."""
FADES_IN, LEAST_COUNT = 512, 4
"""Plain rounds in which what is known of rounds with drafts counts less by the factor e, down to so many rounds: only
probes, which are rare, tell of a machine that has changed meanwhile.
"""
ELSEWHERE_COUNTS_AS = 8.0
"""Rounds with drafts from which on a number of streams is judged more by its own than by all numbers together."""


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
        self._since_plain: dict[int, int] = {}
        """Rounds with drafts since the last look at plain ones, by number of streams."""
        self.forget()

    def forget(self) -> None:
        """Nothing is known any more: what was expected has changed, as after a drift of the curve."""
        self._plain: dict[int, _Mean] = {}
        """Measured over expected time of plain rounds, as logarithms, by number of streams."""
        self._drafted: dict[int, _Mean] = {}
        """The same of rounds with drafts, less what plain ones take longer at the time."""
        self._anywhere = _Mean()
        self._just_drafted: set[int] = set()

    def see(self, streams: int, drafted: bool, ms: float, expected_ms: float) -> None:
        """A whole round's measured and expected milliseconds."""
        if ms <= 0 or expected_ms <= 0:
            return
        deviation = log(ms / expected_ms)
        if drafted:
            self._since_plain[streams] = self._since_plain.get(streams, 0) + 1
            known = self._plain.get(streams)
            if known is not None:
                self._drafted.setdefault(streams, _Mean()).add(deviation - known.value)
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

        ``margin``: how many times its worth drafting is thought to bring, were there no handicap; where the worst that
        is believed would not undo it, there is nothing to find out.
        """
        if margin > exp(MOST):
            return False
        after = PLAIN_AFTER if streams in self._plain else FORGOTTEN_AFTER
        return self._since_plain.get(streams, after) >= after

    def factor(self, streams: int) -> float:
        """By what a round with drafts takes longer than expected where a plain one takes what is expected."""
        own = self._drafted.get(streams)
        weight = 0.0 if own is None else own.count / (own.count + ELSEWHERE_COUNTS_AS)
        mine = weight * own.value if own is not None else 0.0
        return exp(max(-MOST, min(MOST, mine + (1 - weight) * self._anywhere.value)))
