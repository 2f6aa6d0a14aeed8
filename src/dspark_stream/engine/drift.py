"""Whether rounds still take what the capacity curve says: a machine changes while a service runs.

A neighbour takes a core, the clock goes down, caches hold more or less than when the curve was measured. The ratio of
measured to expected time is watched for every size of pass and for drafting, by medians over many rounds.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from statistics import median

from dspark_stream.spec.capacity import CapacityCurve

log = logging.getLogger(__name__)

WINDOW = 24
"""Rounds whose median counts; one slow round, or ten, move nothing."""
TOLERANCE = 1.04
"""Ratios within this are noise."""
NOTABLE = 1.5
"""A drift by this much, either way, since the last time it was told, is told."""


class Drift:
    """Follows a curve's drift; `curve` is the one to go by."""

    def __init__(self, curve: CapacityCurve) -> None:
        self._measured = self.curve = curve
        self._verify: list[float | None] = [None] * len(curve.tokens)
        """How many times as long passes of each size take; None where none was seen."""
        self._draft: list[float | None] = [None] * len(curve.streams)
        """The same of drafting for each number of streams."""
        self._told = (1.0, 1.0)
        self._seen: dict[tuple[str, int], list[float]] = {}

    @property
    def ratio(self) -> float:
        """How many times as long passes take as was measured: the median over the sizes that were seen. What was not
        seen is taken to have drifted as much.
        """
        return median([f for f in self._verify if f is not None] or [1.0])

    @property
    def draft_ratio(self) -> float:
        """The same of drafting; what was not seen of it is taken to have drifted as passes have."""
        return median([f for f in self._draft if f is not None] or [self.ratio])

    def see(self, tokens: int, verify: float, drafting: int = 0, draft: float | None = None) -> bool:
        """One round: measured over expected time of its pass over ``tokens``, and of drafting for so many streams.

        Returns whether `curve` has changed.
        """
        passes, drafts = self.ratio, self.draft_ratio
        changed = self._follow("pass", self._verify, self._nearest(self.curve.tokens, tokens), verify, passes)
        if draft is not None and drafting and self._draft:
            nearest = self._nearest(self.curve.streams, drafting)
            changed |= self._follow("draft", self._draft, nearest, draft, drafts)
        if changed:
            # what was collected of sizes that go by the others was held against the old curve
            for kind, known, moved in (
                ("pass", self._verify, self.ratio != passes),
                ("draft", self._draft, self.draft_ratio != drafts),
            ):
                for i, factor in enumerate(known):
                    if factor is None and moved:
                        self._seen.pop((kind, i), None)
            self.curve = self._measured.scaled(
                [f or self.ratio for f in self._verify], [f or self.draft_ratio for f in self._draft]
            )
            self._tell()
        return changed

    def _follow(self, kind: str, known: list[float | None], i: int, ratio: float, everywhere: float) -> bool:
        """Size i's factor takes in one round's ratio; whether that changed it."""
        middle = self._median((kind, i), ratio)
        if middle is None:
            return False
        # of what the curve says now, which may be more than this size's own factor: more never costs less there
        now, measured = (
            (self.curve.verify_ms, self._measured.verify_ms)
            if kind == "pass"
            else (self.curve.draft_ms, self._measured.draft_ms)
        )
        known[i] = middle * (now[i] / measured[i] if measured[i] > 0 else known[i] or everywhere)
        return True

    @staticmethod
    def _nearest(sizes: list[int], size: int) -> int:
        i = min(bisect_left(sizes, size), len(sizes) - 1)
        return i - 1 if i and size - sizes[i - 1] < sizes[i] - size else i

    def _median(self, kind: tuple[str, int], ratio: float) -> float | None:
        """The median of a full window, where it is no noise."""
        window = self._seen.setdefault(kind, [])
        window.append(ratio)
        if len(window) < WINDOW:
            return None
        middle = median(window)
        window.clear()
        return None if 1 / TOLERANCE < middle < TOLERANCE else middle

    def _tell(self) -> None:
        now = (self.ratio, self.draft_ratio)
        if not all(1 / NOTABLE < a / b < NOTABLE for a, b in zip(now, self._told, strict=True)):
            self._told = now
            log.warning(
                "rounds drift from the capacity curve: passes take %.2f times what was measured, drafting %.2f times; "
                "scheduling goes by what they take now (dspark-stream profile --again measures anew)",
                *now,
            )
