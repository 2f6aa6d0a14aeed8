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
        self._draft: float | None = None
        """The same of drafting."""
        self._told = (1.0, 1.0)
        self._seen: dict[int, list[float]] = {}

    @property
    def ratio(self) -> float:
        """How many times as long passes take as was measured: the median over the sizes that were seen. What was not
        seen is taken to have drifted as much.
        """
        return median([f for f in self._verify if f is not None] or [1.0])

    def see(self, tokens: int, verify: float, draft: float | None) -> bool:
        """One round: measured over expected time of its pass over ``tokens`` and of its drafting, if it drafted.

        Returns whether `curve` has changed.
        """
        nearest, everywhere = self._nearest(tokens), self.ratio
        changed = False
        if (ratio := self._median(nearest, verify)) is not None:
            self._verify[nearest] = (self._verify[nearest] or everywhere) * ratio
            changed = True
        if draft is not None and (ratio := self._median(-1, draft)) is not None:
            self._draft = (self._draft or everywhere) * ratio
            changed = True
        if changed:
            if self.ratio != everywhere:  # what was collected of sizes that go by it was held against the old curve
                unseen = [i for i, f in enumerate(self._verify) if f is None] + ([-1] if self._draft is None else [])
                for kind in unseen:
                    self._seen.pop(kind, None)
            everywhere = self.ratio
            factors = [f or everywhere for f in self._verify]
            self.curve = self._measured.scaled(factors, self._draft or everywhere)
            self._tell()
        return changed

    def _nearest(self, tokens: int) -> int:
        sizes = self.curve.tokens
        i = min(bisect_left(sizes, tokens), len(sizes) - 1)
        return i - 1 if i and tokens - sizes[i - 1] < sizes[i] - tokens else i

    def _median(self, kind: int, ratio: float) -> float | None:
        """The median of a full window, where it is no noise."""
        window = self._seen.setdefault(kind, [])
        window.append(ratio)
        if len(window) < WINDOW:
            return None
        middle = median(window)
        window.clear()
        return None if 1 / TOLERANCE < middle < TOLERANCE else middle

    def _tell(self) -> None:
        now = (self.ratio, self._draft or self.ratio)
        if not all(1 / NOTABLE < a / b < NOTABLE for a, b in zip(now, self._told, strict=True)):
            self._told = now
            log.warning(
                "rounds drift from the capacity curve: passes take %.2f times what was measured, drafting %.2f times; "
                "scheduling goes by what they take now (dspark-stream profile --again measures anew)",
                *now,
            )
