"""The size of the next captured round: how many rows it has, and whether anybody is drafted for.

What a round costs is decided when its graph is chosen, so the host chooses, from rounds that it has read: survivals,
accepted lengths and times. Never from live confidences, since x_k must not decide about its own admission (decision
010); so every choice is lossless under every verification.

A graph's draft pass costs the same for one stream of its seats as for all, so drafting is skipped for everybody or for
nobody; who gets the rows of a drafted round is for admission to say, on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from statistics import median

import numpy as np

from dspark_stream.decoding.schedule import EarlyStop, Fixed, Schedule, Threshold
from dspark_stream.engine.captured.graphs import RoundLadder, Size
from dspark_stream.engine.stream import Stream
from dspark_stream.load.acceptance import Acceptance

WORTHWHILE = 1.02
"""Drafting must promise so many times the throughput of leaving it out."""
FIRST_WAIT, LONGEST_WAIT = 32, 1024
"""Rounds without drafts until one is drafted only to look; doubled by every look that changes nothing."""
TIMES = 9
"""Rounds of which the median says what they take beyond the time that was measured with nobody seated."""


class Sizing:
    """Chooses; told what every round took.

    Args:
        ladder: the captured sizes and their times.
        schedule: which one holds; it may be changed.
        acceptance: what drafts have been like, of every stream.
    """

    def __init__(self, ladder: RoundLadder, schedule: Schedule, acceptance: Acceptance) -> None:
        self._ladder, self.schedule, self._acceptance = ladder, schedule, acceptance
        self._beyond: dict[bool, deque[float]] = {drafting: deque(maxlen=TIMES) for drafting in (True, False)}
        self._idle, self._wait = 0, FIRST_WAIT
        self.probes = 0
        """Rounds that were drafted only to look."""

    def choose(self, streams: Sequence[Stream], slowest_ms: float = inf) -> Size:
        """The next round's size for these streams; one that takes no longer than ``slowest_ms``, if there is one."""
        seats, schedule = self._ladder.fit_seats(len(streams)), self.schedule
        drafting = [s for s in streams if s.drafts]
        if not drafting or (isinstance(schedule, Fixed) and not schedule.length):
            return Size(seats, seats, False)
        idle = Size(seats, seats, False, context=True)
        offered = [size for size in self._ladder.drafting_sizes(seats) if size.rows >= len(streams)]
        if idle not in self._ladder.round_ms:  # nothing was measured
            return offered[-1]
        if isinstance(schedule, EarlyStop):
            offered = offered[-1:]
        in_time = [size for size in offered if self.ms(size) <= slowest_ms]
        if not in_time:
            return idle
        if isinstance(schedule, Fixed | Threshold):
            return in_time[-1]
        best, gain = self._best(in_time, drafting, len(streams))
        if gain > WORTHWHILE * len(streams) / self.ms(idle):
            self._idle, self._wait = 0, FIRST_WAIT
            return best
        self._idle += 1
        if self._idle < self._wait:
            return idle
        self._idle, self._wait = 0, min(2 * self._wait, LONGEST_WAIT)
        self.probes += 1
        return best

    def _best(self, offered: Sequence[Size], drafting: Sequence[Stream], count: int) -> tuple[Size, float]:
        """The size that promises most committed tokens a millisecond, and how many."""
        accepted = self._acceptance.expected([s.past for s in drafting if s.past is not None])[0, :, 0]  # [m, γ]
        promised = np.sort(np.diff(accepted, prepend=0.0), axis=None)[::-1]
        rates = [(count + float(promised[: size.rows - count].sum())) / self.ms(size) for size in offered]
        most = max(rates)
        return offered[rates.index(most)], most

    def ms(self, size: Size) -> float:
        """What a round of that size takes at present: as measured with nobody seated, and what came on top lately."""
        own, other = self._beyond[size.drafting], self._beyond[not size.drafting]
        return self._ladder.round_ms[size] + (median(own or other) if own or other else 0.0)

    def plain_ms(self, count: int) -> float:
        """A round of ``count`` streams with nothing drafted; 0 where nothing was measured."""
        seats = self._ladder.fit_seats(count)
        size = Size(seats, seats, False)
        return self.ms(size) if size in self._ladder.round_ms else 0.0

    def steps_a_second(self, count: int) -> list[float] | None:
        """SPS(B) for B = 0 … whole blocks as the measured sizes for ``count`` streams have it, a staircase: for
        `EarlyStop`, which decides on the device. None for other schedules, and where nothing was measured.
        """
        seats = self._ladder.fit_seats(count)
        steps = sorted((s.rows, self.ms(s)) for s in self._ladder.round_ms if s.seats == seats and s.drafting)
        if not isinstance(self.schedule, EarlyStop) or not steps:
            return None
        return [1000.0 / next(ms for rows, ms in steps if rows >= b) for b in range(steps[-1][0] + 1)]

    def saw_round(self, size: Size, ms: float) -> None:
        """A round followed another one at once and took so long."""
        if (measured := self._ladder.round_ms.get(size)) is not None:
            self._beyond[size.drafting].append(max(0.0, ms - measured))
