"""Who takes part in the next round, and how long it may take: bounds on the gap between a stream's chunks.

A bound is kept by not drafting, by verifying less, by shorter prompt chunks and, where even a plain round of everybody
takes too long, by letting the streams without a bound take turns. It is kept when possible: with more bounded streams
than the machine can serve in time, they all just go as fast as it goes. Nobody starves: of the streams that take turns
the one that has waited longest is always in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

from dspark_stream.engine.stream import Stream

SAFE = 0.9
"""Of the time that a bound leaves, what is planned for: expected times are medians."""


class Pace(NamedTuple):
    """The next round's."""

    streams: list[Stream]
    slowest_ms: float
    """What the round may take; infinite where nobody set a bound."""


def pace(streams: Sequence[Stream], round_ms: Callable[[int], float], now_s: float) -> Pace:
    """Choose the company of the next round.

    Args:
        streams: those that decode.
        round_ms: a plain round of so many of them.
        now_s: ``time.perf_counter``.
    """
    bounded = [s for s in streams if s.max_chunk_gap_ms < inf]
    if not bounded:
        return Pace(list(streams), inf)
    slack_ms = SAFE * min(s.max_chunk_gap_ms - 1e3 * (now_s - s.last_chunk_s) for s in bounded)
    tightest_ms = SAFE * min(s.max_chunk_gap_ms for s in bounded)
    free = sorted((s for s in streams if s.max_chunk_gap_ms == inf), key=lambda s: s.last_chunk_s)
    if not free or round_ms(len(streams)) <= tightest_ms:
        return Pace(list(streams), slack_ms)
    room = 1
    while room < len(free) and round_ms(len(bounded) + room + 1) <= tightest_ms:
        room += 1
    return Pace([*bounded, *free[:room]], slack_ms)  # in the order of the queue, which the next turns go by
