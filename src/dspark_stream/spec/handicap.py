"""How much longer rounds with drafts take than the capacity curve says, against rounds without: learnt from rounds.

Whether drafting pays hangs on a few percent, and a curve that was measured in seconds, on streams that nobody reads, is
not that exact: committing accepted tokens takes longer than committing none, other passes leave other things in the
processor's caches, and how much of that a measurement meets is chance. What counts is one ratio at the number of
streams of the moment, and it is learnt where rounds with drafts and without follow one another: a machine that is slow
as a whole, or for a second, does not move it.
"""

from __future__ import annotations

from math import exp, log
from typing import NamedTuple

from dspark_stream.spec.capacity import Costs
from dspark_stream.spec.neighbours import WIDTH, Neighbours

MEMORY = 4.0
"""Changes between rounds with drafts and without after which what was seen counts less by the factor e."""
PRIOR = 1.0
"""Changes as which it counts that a curve is right."""
SURPRISE = 0.15
"""Of one change's deviation, as a logarithm, so much is believed."""
MOST = 0.25
"""A handicap beyond this, as a logarithm, is not believed: it would end drafting, and with it what could correct it."""
FIRST_LOOK, LAST_LOOK = 16, 512
"""Rounds with drafts of a number of streams after which plain ones are wanted again, to hold the others against, or
plain ones after which drafts are: at first, and at most; twice as many every time."""
FADES_IN, LEAST_COUNT = 512, 1.0
"""Plain rounds in which what is known of rounds with drafts counts less by the factor e, down to so many changes: only
probes and looks, which are rare, tell of a machine that has changed meanwhile.
"""
ELSEWHERE_COUNTS_AS = 1.0
"""Changes from which on a number of streams is judged more by its own than by all numbers together."""


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

    def __init__(self, count: float = 0.0) -> None:
        self.value, self.count = 0.0, count

    def add(self, value: float, weight: float) -> None:
        self.count = min(self.count + weight, MEMORY)
        step = max(-SURPRISE, min(SURPRISE, value - self.value))
        self.value += step * weight / self.count

    def fade(self) -> None:
        self.count = max(self.count * (1.0 - 1.0 / FADES_IN), min(self.count, LEAST_COUNT))


class Handicap:
    """One for an engine."""

    def __init__(self) -> None:
        self._rounds: Neighbours[tuple[int, bool]] = Neighbours()
        """Measured over expected time, as logarithms, of rounds of so many streams, with drafts or without."""
        self._drafted: dict[int, _Mean] = {}
        """How much more that is with drafts than without, by number of streams."""
        self._anywhere = _Mean(PRIOR)
        self._just_drafted: set[int] = set()
        self._since_plain: dict[int, int] = {}
        """Rounds with drafts since the last plain one, of numbers of streams of which there were plain ones."""
        self._patience: dict[int, int] = {}
        """After how many of them plain ones are wanted again."""
        self._since_drafts: dict[int, int] = {}
        """Plain rounds since there was a run of rounds with drafts, or a look was begun, of numbers of streams with so
        many bits: more kinds would take more looks than they are worth."""
        self._drafts_after: dict[int, int] = {}
        """After how many of them the next look is due."""
        self._drafted_in_a_row = 0
        self._last: dict[tuple[int, bool], Shape] = {}
        """The last round of each kind."""

    def rebase(self, before: Costs, after: Costs) -> None:
        """What rounds are expected to take has changed: hold what they took against that."""

        def cheaper(streams: int, drafted: bool) -> float:
            shape = self._last[streams, drafted]
            return log(shape.ms(before) / shape.ms(after))

        self._rounds.move(lambda kind: cheaper(*kind))
        shifts = {streams: cheaper(streams, True) - cheaper(streams, False) for streams in self._drafted}
        for streams, mean in self._drafted.items():
            mean.value += shifts[streams]
        self._anywhere.value += sum(shifts.values()) / max(1, len(shifts))

    def see(self, shape: Shape, ms: float, expected_ms: float) -> None:
        """A whole round's measured and expected milliseconds."""
        streams, drafted = shape.streams, shape.drafting > 0
        if ms <= 0 or expected_ms <= 0:
            return
        self._last[streams, drafted] = shape
        if drafted:
            if streams in self._since_plain:
                self._since_plain[streams] += 1
            self._just_drafted.add(streams)
            self._drafted_in_a_row += 1
            if self._drafted_in_a_row >= WIDTH:
                self._since_drafts[streams.bit_length()] = 0
        else:
            self._drafted_in_a_row = 0
            for fading in (self._drafted.get(streams), self._anywhere):
                if fading is not None:
                    fading.fade()
            if streams in self._just_drafted:  # it still pays for what drafting drove out of the caches
                self._just_drafted.remove(streams)
                return
            self._patience.setdefault(streams, FIRST_LOOK)
            self._since_plain[streams] = 0
            size = streams.bit_length()
            self._since_drafts[size] = self._since_drafts.get(size, 0) + 1
        step = self._rounds.see((streams, drafted), log(ms / expected_ms))
        if step is None or step.before[0] != step.after[0]:
            return
        more = step.size if step.after[1] else -step.size
        if not step.after[1]:  # a look has told something
            self._patience[step.after[0]] = min(2 * self._patience[step.after[0]], LAST_LOOK)
        elif step.weight == 1.0:  # and not a probe
            size = step.after[0].bit_length()
            self._drafts_after[size] = min(2 * self._drafts_after.get(size, FIRST_LOOK), LAST_LOOK)
        self._drafted.setdefault(step.after[0], _Mean()).add(more, step.weight)
        self._anywhere.add(more, step.weight)

    def wants_plain(self, streams: int, margin: float) -> bool:
        """Whether a few plain rounds of so many streams would tell more than they cost.

        ``margin``: the throughput that drafts promise over what they would have to, with no handicap counted. Where the
        worst that is believed would not undo it, there is nothing to find out.
        """
        if margin > exp(MOST):
            return False
        return streams not in self._since_plain or self._since_plain[streams] >= self._patience[streams]

    def take_look(self, streams: int, margin: float) -> bool:
        """Whether to draft for a few rounds where plain ones are thought to be better; it then counts as done.

        Without looks, a curve that makes drafts a little too dear would never be found out: the rounds that could tell
        are those that it rules out.

        ``margin``: see `wants_plain`; where the best that is believed would not make drafts pay, nothing is looked at.
        """
        size = streams.bit_length()
        due = self._since_drafts.get(size, 0) >= self._drafts_after.get(size, FIRST_LOOK)
        if not due or margin < exp(-MOST):
            return False
        self._since_drafts[size] = 0
        return True

    def factor(self, streams: int) -> float:
        """By what a round with drafts takes longer than expected where a plain one takes what is expected."""
        own = self._drafted.get(streams)
        weight = 0.0 if own is None else own.count / (own.count + ELSEWHERE_COUNTS_AS)
        mine = weight * own.value if own is not None else 0.0
        return exp(max(-MOST, min(MOST, mine + (1 - weight) * self._anywhere.value)))
