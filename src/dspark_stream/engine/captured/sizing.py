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
from math import inf
from typing import Any

import msgspec
import numpy as np

from dspark_stream.decoding.schedule import EarlyStop, Fixed, Schedule, Threshold
from dspark_stream.engine.captured.graphs import RoundLadder, Size
from dspark_stream.engine.stream import Stream
from dspark_stream.load.controller import Controller, Plan
from dspark_stream.load.costs import CapacityCurve, Company, Shape


class CapturedCurve(CapacityCurve, frozen=True, kw_only=True):
    """A capacity curve with the times of captured sizes, as far as there are any: steps, not lines.

    They were measured with nobody seated. What attention takes on top is learnt, as all that a curve leaves out is.
    """

    ladder: RoundLadder

    @classmethod
    def over(cls, ladder: RoundLadder, measured: CapacityCurve) -> CapturedCurve:
        """``measured``: for rows that no captured round has."""
        return cls(ladder=ladder, **msgspec.structs.asdict(measured))

    def pass_ms(self, batch_tokens: Any, company: Company) -> Any:
        """A whole round over B rows, less what its draft pass takes."""
        ms, rows = np.array(super().pass_ms(batch_tokens, company), dtype=float), np.asarray(batch_tokens)
        seats, known = self.ladder.fit_seats(company.streams), self.ladder.round_ms
        draft_ms = self.drafting_ms(1, 1, company)
        for size in reversed(self.ladder.drafting_sizes(seats)):
            if size in known:
                ms = np.where(rows <= size.rows, known[size] - draft_ms, ms)
        plain_ms = self._plain_ms(seats)
        return ms if plain_ms is None else np.where(rows <= seats, plain_ms, ms)

    def rows(self, batch_tokens: Any, company: Company) -> Any:
        """Those of the smallest size that holds them, if there is one."""
        rows = held = np.asarray(batch_tokens)
        seats = self.ladder.fit_seats(company.streams)
        for size in (*reversed(self.ladder.drafting_sizes(seats)), Size(seats, seats, False)):
            held = np.where(rows <= size.rows, size.rows, held)
        return held

    def drafting_ms(self, drafting: Any, slots: Any, company: Company) -> Any:
        """The same for every number of streams and slots. 0 where rounds of one length alone are timed: all that such a
        round takes is its pass's.
        """
        seats, known = self.ladder.fit_seats(company.streams), self.ladder.round_ms
        plain_ms, timed = self._plain_ms(seats), [s for s in self.ladder.drafting_sizes(seats) if s in known]
        if not timed or plain_ms is None:
            return super().drafting_ms(drafting, slots, company)
        draft_ms = max(0.0, known[timed[0]] - plain_ms) if timed[0].rows == seats else 0.0
        return np.full(np.broadcast(drafting, slots).shape, draft_ms)

    def _plain_ms(self, seats: int) -> float | None:
        known = self.ladder.round_ms
        return known.get(Size(seats, seats, False, context=True), known.get(Size(seats, seats, False)))


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
        idle, offered = Size(seats, seats, False, context=True), self._ladder.drafting_sizes(seats)[::-1]
        if isinstance(schedule, EarlyStop):
            offered = offered[:1]  # the device cuts whole blocks
        if not isinstance(schedule, Fixed | Threshold):
            plan = controller.plan([s.past for s in streams], Company(count, 0.0), looks=slowest_ms == inf)
            if plan is not self._plan:
                self._plan, self._ranked = plan, [idle]
                if any(plan.drafting):
                    self._ranked = self._rank([*offered, idle], plan, streams)
            offered = self._ranked
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

    def _rank(self, offered: Sequence[Size], plan: Plan, streams: Sequence[Stream]) -> list[Size]:
        """By the tokens that they promise, less their time at the plan's price. Admission takes the best drafts."""
        drafting = [s.past for s, drafts in zip(streams, plan.drafting, strict=True) if drafts and s.past is not None]
        accepted = self._controller.acceptance.expected(drafting)[0, :, 0]  # [m, γ]
        best = np.sort(np.diff(accepted, prepend=0.0), axis=None)[::-1]
        count = len(streams)

        def gain(size: Size) -> float:
            drafts = size.rows - count if size.drafting else 0
            return float(best[:drafts].sum()) - plan.price * self._ms(count, size)

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
