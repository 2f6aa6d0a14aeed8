"""The capacity curve: how long a round takes on this machine, as a function of what it carries.

SPS(B) of the paper's Algorithm 1 is `CapacityCurve.sps`. Measured at start from real passes, kept on disk.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from statistics import median

import msgspec

POINT_MS = 500.0
"""No more passes at a size than this buys: a slow machine should not wait a minute for its service."""


class CapacityCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a round's parts; linear between measured points.

    ``verify_ms``: a target pass over that many ``tokens`` of one stream. ``stream_ms``: what the same pass costs more
    when its tokens belong to that many ``streams``. ``draft_ms``: drafting for that many streams.
    """

    tokens: list[int]
    verify_ms: list[float]
    streams: list[int]
    stream_ms: list[float]
    draft_ms: list[float]

    def round_ms(self, batch_tokens: int, streams: int, drafting: int) -> float:
        """A whole round: drafting for ``drafting`` of R ``streams``, then a pass over B ``batch_tokens``."""
        verify = interpolate(self.tokens, self.verify_ms, batch_tokens)
        more = interpolate(self.streams, self.stream_ms, streams)
        draft = interpolate(self.streams, self.draft_ms, drafting) if drafting else 0.0
        return verify + more + draft

    def sps(self, batch_tokens: int, streams: int, drafting: int) -> float:
        """Rounds a second when a round carries ``batch_tokens`` target tokens."""
        return 1000.0 / self.round_ms(batch_tokens, streams, drafting)


def measure(
    time_rows_ms: Callable[[int], float],
    time_streams_ms: Callable[[int], float],
    time_draft_ms: Callable[[int], float] | None,
    *,
    max_tokens: int,
    max_streams: int,
    repeats: int = 3,
    on_point: Callable[[], None] = lambda: None,
) -> CapacityCurve:
    """Time real passes at a ladder of sizes; medians, made monotone.

    Args:
        time_rows_ms: runs one target pass over that many tokens of one stream and returns its milliseconds.
        time_streams_ms: the same over one token of each of that many streams.
        time_draft_ms: the same for drafting for that many streams; None without a drafter.
        max_tokens: the largest B.
        max_streams: the largest R.
        repeats: passes a point; their median counts.
        on_point: called after every point, for a progress bar.
    """

    def points(sizes: Sequence[int], run: Callable[[int], float]) -> list[float]:
        times = []
        for size in sizes:
            run(size)  # the first pass at a size pays for buffers and kernel choice
            passes = [run(size)]
            while len(passes) < repeats and sum(passes) < POINT_MS:
                passes.append(run(size))
            times.append(median(passes))
            on_point()
        return times

    tokens, streams = ladder(max_tokens), ladder(max_streams)
    verify_ms = monotone(points(tokens, time_rows_ms))
    together = points(streams, time_streams_ms)
    more = [max(0.0, ms - interpolate(tokens, verify_ms, r)) for r, ms in zip(streams, together, strict=True)]
    draft_ms = monotone(points(streams, time_draft_ms)) if time_draft_ms else [0.0] * len(streams)
    return CapacityCurve(
        tokens=tokens, verify_ms=verify_ms, streams=streams, stream_ms=monotone(more), draft_ms=draft_ms
    )


def ladder(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, … up to and including ``largest``: where curves bend, and few points."""
    sizes = {1, 3, largest} if largest >= 3 else {1, largest}
    step = 2
    while step <= largest:
        sizes |= {step, step * 3 // 2} if step > 2 else {step}
        step *= 2
    return sorted(s for s in sizes if s <= largest)


def monotone(values: Sequence[float]) -> list[float]:
    """The closest non-decreasing sequence in least squares (pool adjacent violators): more never costs less."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [mean for mean, n in blocks for _ in range(n)]


def interpolate(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    """Linear between points, flat before the first, on with the last slope after the last."""
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        if len(xs) == 1 or x == xs[-1]:
            return ys[-1]
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        return ys[-1] + slope * (x - xs[-1])
    i = bisect_left(xs, x)
    if xs[i] == x:
        return ys[i]
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])
