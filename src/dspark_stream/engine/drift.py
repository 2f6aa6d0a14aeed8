"""Whether rounds still take what the capacity curve says: a machine changes while a service runs.

A neighbour takes a core, the clock goes down, caches hold more or less than when the curve was measured. Two things are
told apart. The *pace* is what all rounds take longer alike, by the smallest passes that were seen: it matters to
whoever counts milliseconds, and to no choice between lengths. The *shape* is how far passes of each size are apart, and
drafting from a pass: every choice hangs on it, so it is learnt only from rounds that met the same machine, neighbours
of different sizes and drafting beside the pass of its own round.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import exp, log
from statistics import median

import numpy as np

from dspark_stream.spec.capacity import CapacityCurve, Costs, RoundCost
from dspark_stream.spec.handicap import Handicap, Shape
from dspark_stream.spec.neighbours import Neighbours, Step

logger = logging.getLogger(__name__)

WINDOW = 24
"""Rounds between two looks at whether the curve still holds; where their median is beyond what is tolerated, it is the
pace. Of drafting medians over so many rounds are taken in, by half."""
TOLERANCE, PACE_TOLERANCE = 0.03, 0.1
"""Deviations, as logarithms, within which the curve stands: of sizes from one another, and of all of them."""
SURPRISE = 0.15
"""Of one change's deviation so much is believed."""
GAIN = 0.25
"""Of what neighbours say against what is known, so much is taken in; more at first."""
KNOWN = 32.0
"""Changes from which on a size is as well known as any other."""
NOTABLE = 1.5
"""A pace that has changed by this much, either way, is told: once, since neighbours come and go all day. The metric
`capacity_drift_ratio` says where it is."""


class _Shape:
    """How many times as long each size takes, beside the others; as logarithms."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._at = np.log(sizes)
        self._known: dict[int, float] = {}

    def __getitem__(self, i: int) -> float:
        return self._known[i] if i in self._known else self.all()[i]

    def move(self, by: Mapping[int, float]) -> None:
        """These sizes take so much longer than was thought."""
        self._known.update({i: self[i] + more for i, more in by.items()})

    def lower(self, by: float) -> None:
        """All that is known is so much less."""
        self.move(dict.fromkeys(self._known, -by))

    def anchor(self) -> float:
        """Let the smallest known size take what was measured; by how much all have become less for it."""
        level = self._known[min(self._known)]
        self.lower(level)
        return level

    def all(self) -> list[float]:
        """Of every size: what was not seen lies between what was."""
        if not self._known:
            return [0.0] * len(self._at)
        seen = sorted(self._known)
        return [float(v) for v in np.interp(self._at, self._at[seen], [self._known[i] for i in seen])]


class Drift:
    """Follows a curve's drift; `curve` is the one to go by."""

    def __init__(self, curve: CapacityCurve) -> None:
        self._measured = self.curve = curve
        self._passes, self._drafts = _Shape(curve.tokens), _Shape(curve.streams)
        self._sizes: Neighbours[int] = Neighbours()
        self._changes = [0.0] * len(curve.tokens)
        """Of each size to and from others, as many as were seen."""
        self._pace = 0.0
        self._told = False
        self._lately: list[float] = []
        self._drafts_lately: dict[int, list[float]] = {}
        self._wanted = [0.0] * (len(curve.tokens) + len(curve.streams))
        """What `curve` was made from, as logarithms, passes before drafts."""
        self._in_curve = [0.0] * len(curve.tokens), [0.0] * len(curve.streams)
        """The same of `curve` as it is: more tokens never take less there."""

    @property
    def ratio(self) -> float:
        """How many times as long rounds take as was measured, whatever they carry."""
        return exp(self._pace)

    def see(self, tokens: int, verify: float, drafting: int = 0, draft: float | None = None) -> bool:
        """One round: measured over expected time of its pass over ``tokens``, and of drafting for so many streams.

        Returns whether `curve` has changed.
        """
        i = _nearest(self.curve.tokens, tokens)
        takes = log(verify) + self._in_curve[0][i]
        if (step := self._sizes.see(i, takes)) is not None:
            self._learn(step)
        pace = takes - self._passes[i]
        if draft is not None and drafting and self.curve.streams:
            j = _nearest(self.curve.streams, drafting)
            lately = self._drafts_lately.setdefault(j, [])
            lately.append(log(draft) + self._in_curve[1][j] - pace)
            if len(lately) == WINDOW:
                self._drafts.move({j: 0.5 * (median(lately) - self._drafts[j])})
                lately.clear()
        self._lately.append(pace)
        return len(self._lately) == WINDOW and self._follow()

    def _learn(self, step: Step[int]) -> None:
        """Two sizes are further apart, or less, than was thought: who is known less gives way."""
        a, b = step.before, step.after
        known = self._changes[a], self._changes[b]
        wrong = step.size - (self._passes[b] - self._passes[a])
        by = max(GAIN, 1 / (1 + min(known))) * step.weight * max(-SURPRISE, min(SURPRISE, wrong))
        share = (1 + known[0]) / (2 + sum(known))
        self._passes.move({a: by * (share - 1), b: by * share})
        for size in (a, b):
            self._changes[size] = min(self._changes[size] + step.weight, KNOWN)
        level = self._passes.anchor()  # the rest of it is pace, beside which drafting is so much less
        self._pace += level
        self._lately = [value + level for value in self._lately]
        self._drafts.lower(level)
        for lately in self._drafts_lately.values():
            lately[:] = [value - level for value in lately]

    def _follow(self) -> bool:
        """Take in what was learnt, where it is worth it; whether it was."""
        pace = median(self._lately)
        self._lately.clear()
        if abs(pace - self._pace) > PACE_TOLERANCE:
            self._pace = pace
            self._tell()
        passes, drafts = self._passes.all(), self._drafts.all()
        wanted = [self._pace + shape for shape in passes + drafts]
        off = [a - b for a, b in zip(wanted, self._wanted, strict=True)]
        if max(off) - min(off) <= TOLERANCE and max(map(abs, off)) <= PACE_TOLERANCE:
            return False
        self._wanted, before = wanted, self._measured
        self.curve = now = before.scaled(self.ratio, [exp(s) for s in passes], [exp(s) for s in drafts])
        self._in_curve = _logs(now.verify_ms, before.verify_ms), _logs(now.draft_ms, before.draft_ms)
        return True

    def _tell(self) -> None:
        if not self._told and abs(self._pace) > log(NOTABLE):
            self._told = True
            logger.warning(
                "rounds drift from the capacity curve: they take %.2f times what was measured; scheduling goes by what "
                "they take now, whatever that becomes (dspark-stream profile --again measures anew)",
                self.ratio,
            )


def watch(
    drift: Drift,
    handicap: Handicap,
    costs: Costs,
    shape: Shape,
    expected: RoundCost,
    *,
    round_ms: float,
    verify_ms: float,
) -> Costs:
    """What a round took, whole and its pass, against what it should have; the costs to go by from now on."""
    expected_ms = expected(shape.batch_tokens)
    handicap.see(shape, round_ms, expected_ms)
    pass_ms = expected_ms - expected.draft_ms - expected.rest_ms
    draft_ms = round_ms - verify_ms - expected.rest_ms  # all that it takes longer but for its pass, as profiled
    draft = draft_ms / expected.draft_ms if expected.draft_ms and draft_ms > 0 else None
    if pass_ms <= 0 or verify_ms <= 0 or not drift.see(shape.batch_tokens, verify_ms / pass_ms, shape.drafting, draft):
        return costs
    now = Costs(drift.curve)
    handicap.rebase(costs, now)
    return now


def _logs(now: Sequence[float], then: Sequence[float]) -> list[float]:
    return [log(a / b) if b > 0 else 0.0 for a, b in zip(now, then, strict=True)]


def _nearest(sizes: Sequence[int], size: int) -> int:
    i = min(bisect_left(sizes, size), len(sizes) - 1)
    return i - 1 if i and size - sizes[i - 1] < sizes[i] - size else i
