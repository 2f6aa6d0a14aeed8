"""The size of the next captured round: how many rows it has, and whether anybody is drafted for.

What a round costs is decided when its graph is chosen, so the host chooses, from rounds that it has read: by the plan
that all rounds go by (load/controller.py), over the times of captured sizes. Never from live confidences, since x_k
must not decide about its own admission (decision 010); so every choice is lossless under every verification.

A graph's draft pass costs the same for one stream of its seats as for all, so drafting is skipped for everybody or for
nobody; who gets the rows of a drafted round is for admission to say, on the device.

Symbols: R streams, B rows, γ the block's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dspark_stream.decoding.schedule import EarlyStop, Fixed, Schedule, Threshold
from dspark_stream.engine.captured.graphs import RoundLadder, Size
from dspark_stream.engine.stream import Stream
from dspark_stream.load.controller import Controller, Plan
from dspark_stream.load.costs import CapacityCurve, Company, Shape


class CapturedCurve(CapacityCurve, frozen=True, kw_only=True):
    """The times of captured sizes, in steps; of sizes that were not timed, those of the curve as measured.

    They were timed with nobody seated. What attention takes on top is learnt, as all that a curve leaves out is.
    """

    ladder: RoundLadder

    @classmethod
    def over(cls, ladder: RoundLadder, measured: CapacityCurve) -> CapturedCurve:
        """``measured``: of rounds that run operation by operation."""
        return cls(ladder=ladder, **msgspec.structs.asdict(measured))

    def pass_ms(self, batch_tokens: Any, company: Company) -> Any:
        """A whole round in the size that holds B rows, less what its draft pass takes."""
        return self._step(batch_tokens, company)[1]

    def rows(self, batch_tokens: Any, company: Company) -> Any:
        """Those of the size that holds B."""
        return self._step(batch_tokens, company)[0]

    def drafting_ms(self, drafting: Any, slots: Any, company: Company) -> Any:
        """The same for every number of streams and slots."""
        return np.full(np.broadcast(drafting, slots).shape, self._steps(company)[1])

    def _step(self, batch_tokens: Any, company: Company) -> Any:
        steps = self._steps(company)[0]
        return steps[:, np.minimum(np.searchsorted(steps[0], batch_tokens), len(steps[0]) - 1)]

    def _steps(self, company: Company) -> tuple[NDArray[np.float64], float]:
        """Rows of sizes and what rounds of them take without drafting, [2, sizes]; what drafting takes.

        0 where all drafted rounds have one size: what such a round takes is its pass's then.
        """
        seats, known = self.ladder.fit_seats(company.streams), self.ladder.round_ms
        sizes = self.ladder.drafting_sizes(seats)

        def whole_ms(size: Size) -> float:
            if (timed_ms := known.get(size)) is not None:
                return timed_ms
            draft_ms = CapacityCurve.drafting_ms(self, 1, 1, company) if size.drafting else 0.0
            return float(CapacityCurve.pass_ms(self, size.rows, company) + draft_ms)

        plain_ms = whole_ms(Size(seats, seats, False, context=bool(sizes)))
        drafted = {size.rows: whole_ms(size) for size in sizes}
        draft_ms = max(0.0, drafted.get(seats, plain_ms) - plain_ms)
        steps = {rows: ms - draft_ms for rows, ms in drafted.items()} | {seats: plain_ms}
        return np.array(sorted(steps.items())).T, draft_ms


class Sizing:
    """Chooses.

    Args:
        ladder: the captured sizes.
        schedule: the first one.
        controller: over a `CapturedCurve` of that ladder.
        gamma: γ.
    """

    def __init__(self, ladder: RoundLadder, schedule: Schedule, controller: Controller, gamma: int) -> None:
        self._ladder, self.schedule, self._controller, self._gamma = ladder, schedule, controller, gamma
        self._plan: Plan | None = None
        self._ranked: list[Size] = []
        """The plan's, the best first."""

    def choose(self, streams: Sequence[Stream], slowest_ms: float = inf) -> Size:
        """The next round's size for these streams; one that takes no longer than ``slowest_ms``, if there is one."""
        count, schedule, controller = len(streams), self.schedule, self._controller
        seats = self._ladder.fit_seats(count)
        if not any(s.drafts for s in streams) or (isinstance(schedule, Fixed) and not schedule.length):
            return Size(seats, seats, False)
        idle = Size(seats, seats, False, context=True)
        offered = [size for size in reversed(self._ladder.drafting_sizes(seats)) if size.rows > count]
        if not isinstance(schedule, Fixed | Threshold):
            plan = controller.plan([s.past for s in streams], Company(count, 0.0), looks=slowest_ms == inf)
            if plan != self._plan:
                self._plan, self._ranked = plan, self._rank(offered, plan, streams)
            offered = self._ranked
        if slowest_ms == inf and offered:
            return offered[0]
        pace = controller.costs.pace
        return next((size for size in offered if pace * self._ms(count, size) <= slowest_ms), idle)

    def follow(self, schedule: Schedule) -> None:
        """Choose by it from now on."""
        self.schedule, self._plan = schedule, None

    def shape(self, streams: int, size: Size) -> Shape:
        """A round of so many streams, as costs know it."""
        return Shape(Company(streams, 0.0), size.drafting and streams, self._gamma, size.rows)

    def _ms(self, streams: int, size: Size) -> float:
        return self._controller.costs.ms(self.shape(streams, size))

    def _rank(self, offered: list[Size], plan: Plan, streams: Sequence[Stream]) -> list[Size]:
        """By the tokens that they promise, less their time at the plan's price: admission takes the best drafts.

        ``offered``: the largest first. None if the plan drafts for nobody.
        """
        count = len(streams)
        if not any(plan.drafting):
            return []
        if not plan.promised:  # a look at a whole block, whatever it promises
            return [size for size in offered if size.rows >= count + self._gamma][-1:]
        if isinstance(self.schedule, EarlyStop):
            return offered[:1]  # the device cuts whole blocks
        drafting = [s.past for s, drafts in zip(streams, plan.drafting, strict=True) if drafts and s.past is not None]
        accepted = [self._controller.acceptance.expected(past)[0][0] for past in drafting]  # [m][γ]
        each = (after - before for row in accepted for before, after in pairwise([0.0, *row]))
        best = sorted(each, reverse=True)

        def gain(size: Size) -> float:
            return sum(best[: size.rows - count]) - plan.price * self._ms(count, size)

        return sorted(offered, key=gain, reverse=True)

    def steps_a_second(self, count: int) -> list[float] | None:
        """SPS(B) for B = 0 … whole blocks as the measured sizes for ``count`` streams have it, a staircase: for
        `EarlyStop`, which decides on the device. None for other schedules, and where nothing was measured.
        """
        if not isinstance(self.schedule, EarlyStop) or not self._ladder.round_ms:
            return None
        sizes = self._ladder.drafting_sizes(self._ladder.fit_seats(count))
        steps = [(size.rows, self._ms(count, size)) for size in sizes]
        return [1e3 / next(ms for rows, ms in steps if rows >= b) for b in range(steps[-1][0] + 1)]
