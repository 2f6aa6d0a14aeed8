"""Whether rounds still take what the capacity curve says: a machine changes while a service runs.

A neighbour takes a core, the clock goes down, caches hold more or less than when the curve was measured. Most of that
meets all rounds alike, comes and goes within seconds, and decides nothing: what is worth drafting hangs on how sizes
compare. So two things are told apart. The *pace* is what everything takes longer at the moment; it follows within a few
rounds. What a size of pass, or drafting for so many streams, takes longer *beside the pace of its time* is learnt
slowly, from many rounds: held against the curve itself, sizes that are seen minutes apart would tell of the minutes.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import deque
from math import exp, log
from statistics import median

from dspark_stream.spec.capacity import CapacityCurve

logger = logging.getLogger(__name__)

WINDOW = 24
"""Rounds whose median counts; one slow round, or ten, move nothing."""
PACE = 8
"""Of these the latest, whose median is the pace: so much shorter that where it lags behind a machine that has just
changed, it does so for too few rounds to be taken for a size's own."""
TOLERANCE = log(1.04)
"""A size's own deviation within this is noise."""
OUT_OF_PACE = log(1.1)
"""A pace beyond this goes into the curve, whose milliseconds bounds on time go by."""
NOTABLE = log(1.5)
"""A drift by this much beyond all that was told is told."""
KINDS = ("pass", "draft")


class Drift:
    """Follows a curve's drift; `curve` is the one to go by. All factors are kept as logarithms."""

    def __init__(self, curve: CapacityCurve) -> None:
        self._measured = self.curve = curve
        self._level = 0.0
        """What of the pace has gone into the curve."""
        self._verify: list[float | None] = [None] * len(curve.tokens)
        """What passes of each size take longer beside it; None where that was not seen."""
        self._draft: list[float | None] = [None] * len(curve.streams)
        """The same of drafting for each number of streams."""
        self._latest: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        """Of the latest passes, which size and how much longer than `curve` says."""
        self._middles = (0.0, 0.0)
        """Of passes and of drafting, what sizes that were not seen go by."""
        self._rounds = 0
        self._seen: dict[tuple[str, int], list[float]] = {}
        self._moved = {"pass": [0.0] * len(curve.tokens), "draft": [0.0] * len(curve.draft_ms)}
        """By how much `curve` says more than was measured: it may be more than a size's own factor, since more never
        costs less."""
        self._pace = 0.0
        self._told = [(0.0, 0.0), (0.0, 0.0)]
        """From where to where passes and drafting were said to drift."""

    @property
    def pace(self) -> float:
        """How many times as long rounds take at the moment as `curve` says: nearly 1."""
        return exp(self._pace)

    @property
    def ratio(self) -> float:
        """How many times as long passes take as was measured."""
        return exp(self._level + self._pace + self._middles[0])

    @property
    def draft_ratio(self) -> float:
        """The same of drafting."""
        return exp(self._level + self._pace + self._middles[1])

    def see(self, tokens: int, verify: float, drafting: int = 0, draft: float | None = None) -> bool:
        """One round: measured over expected time of its pass over ``tokens``, and of drafting for so many streams.

        Returns whether `curve` has changed.
        """
        size = self._nearest(self.curve.tokens, tokens)
        changed = self._follow("pass", self._verify, size, log(verify) - self._pace)
        self._latest.append((size, log(verify)))
        if draft is not None and drafting and self._draft:
            nearest = self._nearest(self.curve.streams, drafting)
            changed |= self._follow("draft", self._draft, nearest, log(draft) - self._pace)
        if changed:
            self._take_in()
        self._rounds += 1
        if self._rounds % PACE == 0 and len(self._latest) == WINDOW:
            gone = median([much for _, much in self._latest])
            if abs(gone) > OUT_OF_PACE:
                self._level += gone
                self._redraw()
                changed = True
        lately = sorted([self._latest[i][1] for i in range(-min(PACE, len(self._latest)), 0)])
        self._pace = lately[len(lately) // 2]
        if changed:
            self._tell()
        return changed

    def _take_in(self) -> None:
        """Some size's own factor is another: so is what those go by that were not seen."""
        before, passes = self._middles, _middle(self._verify, 0.0)
        self._middles = (passes, _middle(self._draft, passes))
        for kind, factors, old, new in zip(KINDS, (self._verify, self._draft), before, self._middles, strict=True):
            for i, factor in enumerate(factors):
                if factor is None and old != new:  # what was collected was held against what they went by
                    self._seen.pop((kind, i), None)
        self._redraw()

    def _redraw(self) -> None:
        self.curve = self._measured.scaled(
            *(
                [exp(self._level + (middle if f is None else f)) for f in factors]
                for factors, middle in zip((self._verify, self._draft), self._middles, strict=True)
            )
        )
        before, now, measured = self._moved["pass"], self.curve, self._measured
        for kind, of, was in (("pass", now.verify_ms, measured.verify_ms), ("draft", now.draft_ms, measured.draft_ms)):
            self._moved[kind] = [log(a / b) if a > 0 and b > 0 else self._level for a, b in zip(of, was, strict=True)]
        after = self._moved["pass"]
        self._latest = deque(((i, much + before[i] - after[i]) for i, much in self._latest), maxlen=WINDOW)

    def _follow(self, kind: str, known: list[float | None], i: int, beside: float) -> bool:
        """Size i takes in what it took beside the pace in one round; whether its own factor has changed."""
        window = self._seen.setdefault((kind, i), [])
        window.append(beside)
        if len(window) < WINDOW:
            return False
        middle = median(window)
        window.clear()
        is_noise = abs(middle) < TOLERANCE
        if not is_noise or known[i] is None:
            known[i] = (0.0 if is_noise else middle) + self._moved[kind][i] - self._level
        return not is_noise

    @staticmethod
    def _nearest(sizes: list[int], size: int) -> int:
        i = min(bisect_left(sizes, size), len(sizes) - 1)
        return i - 1 if i and size - sizes[i - 1] < sizes[i] - size else i

    def _tell(self) -> None:
        now = (log(self.ratio), log(self.draft_ratio))
        if any(not a - NOTABLE <= x <= b + NOTABLE for x, (a, b) in zip(now, self._told, strict=True)):
            self._told = [(min(a, x), max(b, x)) for x, (a, b) in zip(now, self._told, strict=True)]
            logger.warning(
                "rounds drift from the capacity curve: passes take %.2f times what was measured, drafting %.2f times; "
                "scheduling goes by what they take now (dspark-stream profile --again measures anew)",
                self.ratio,
                self.draft_ratio,
            )


def _middle(factors: list[float | None], otherwise: float) -> float:
    return median([f for f in factors if f is not None] or [otherwise])
