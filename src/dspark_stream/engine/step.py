"""One round: draft → schedule → verify → accept → commit, for all streams as one ragged batch.

This file is the algorithm's table of contents; its words are in ARCHITECTURE.md. Who is drafted for has been planned
before (load/controller.py). Who runs the words, in the order of `WORDS`, may time them (eager.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from dspark_stream.decoding.accept import Outcome, accept
from dspark_stream.decoding.draft import Block, draft
from dspark_stream.decoding.lookup import Found
from dspark_stream.decoding.repeats import confidence
from dspark_stream.decoding.schedule import Candidate, Schedule, pays
from dspark_stream.decoding.survival import prefix_survival
from dspark_stream.decoding.verify import verify
from dspark_stream.engine.context import HANDED_A_ROUND, Context, Part
from dspark_stream.engine.rounds import Committed, Judged, Models, Timings, settle
from dspark_stream.engine.stream import Stream
from dspark_stream.load.acceptance import Past
from dspark_stream.load.controller import Plan
from dspark_stream.load.costs import Company
from dspark_stream.models.protocols import Verified


class Round:
    """R streams; those that are not drafted for take part with ℓ = 0.

    Args:
        models, context: what it works with.
        streams, company: who takes part, and what its cost hangs on.
        plan, schedule: who is drafted for, and what chooses every ℓ.
        slowest_ms: what it may take, as far as the choice is ours.
    """

    output: Verified

    def __init__(
        self,
        models: Models,
        context: Context,
        streams: Sequence[Stream],
        company: Company,
        plan: Plan,
        schedule: Schedule,
        slowest_ms: float,
    ) -> None:
        self._models, self._context, self._schedule = models, context, schedule
        self._company, self._slowest_ms = company, slowest_ms
        self.streams, self.plan = streams, plan
        self.found: list[Found | None] = [None] * len(streams)
        """What every stream's own text went on with before."""
        self.blocks = [Block()] * len(streams)
        self.lengths = [0] * len(streams)
        self.outcomes: list[Outcome] = []
        self.late_ms = 0.0
        """Of its time, what went to context features of earlier rounds."""

    def draft(self) -> None:
        """A block for every stream that has looked up one that promises more, or is drafted for."""
        models, plan = self._models, self.plan
        if self._schedule.looks_up:
            self.found = [s.look_up() for s in self.streams]
        for r, (stream, own) in enumerate(zip(self.streams, self.found, strict=True)):
            if own is None or not plan.promised:
                continue
            sure = confidence(stream.repeats, models.controller.acceptance.repeats, own)
            block = Block(own.tokens, sure, prefix_survival(sure), source="lookup")
            if sum(block.survival) >= plan.promised[r]:
                self.blocks[r] = block
        own_drafts = [d and not b.tokens for d, b in zip(plan.drafting, self.blocks, strict=True)]
        self.plan = plan._replace(drafting=own_drafts)
        drafting = [s for s, drafts in zip(self.streams, own_drafts, strict=True) if drafts]
        if not drafting or models.drafter is None or models.drafter_kv is None:
            return
        self.late_ms += self._context.deliver(drafting)
        made = iter(draft(models.drafter, models.drafter_kv, drafting, models.calibration, models.history, plan.slots))
        self.blocks = [next(made) if d else b for d, b in zip(own_drafts, self.blocks, strict=True)]

    def schedule(self) -> None:
        """ℓ of every stream, by prefix survival and what a round of this company costs."""
        looked_up = [b.survival for b in self.blocks if b.source == "lookup"]
        drafted = any(self.plan.drafting)
        if not drafted and not looked_up:
            return
        controller = self._models.controller
        left_ms = (self._slowest_ms - self.late_ms) / controller.costs.pace
        more = sum(map(len, looked_up))
        cost = controller.costs.round_cost(self._company, *self.plan.size, more).within(left_ms)
        if not drafted and not pays(looked_up, cost, self.plan.price):
            self.blocks = [Block()] * len(self.streams)
            return
        static = self._schedule.slots(self._models.gamma) is not None  # goes by promises as they are
        candidates = []
        same: dict[int, Past] = {}  # streams that draw the same x_1 are judged alike, or one decides about the other
        for stream, block in zip(self.streams, self.blocks, strict=True):
            if block.source == "lookup":  # a function of the past, so whatever is made of it is exact
                candidates.append(Candidate(block.survival, exact=True))
                continue
            if stream.past is None:
                candidates.append(Candidate(()))
                continue
            survival = block.survival
            if survival and not static:
                judged_by = same.setdefault(stream.round_key, stream.past)
                survival = controller.acceptance.corrected(judged_by, survival)
            candidates.append(Candidate(survival, stream.acceptance != "rejection", stream.past.survivals[0]))
        self.lengths = self._schedule.lengths(candidates, cost, self.plan.price)
        # what was looked up and is not worth verifying cost nothing and is no draft
        self.blocks = [
            b if n or b.source == "model" else Block() for b, n in zip(self.blocks, self.lengths, strict=True)
        ]

    def verify(self) -> None:
        """One target pass over anchors and what is verified."""
        self.output = verify(self._models.target, self._models.target_kv, self.streams, self.blocks, self.lengths)

    def accept(self) -> None:
        """Which draft tokens stand, and every stream's bonus token."""
        drafter = self._models.drafter
        ids = drafter.draft_ids if drafter else None
        self.outcomes = accept(self.output, self.streams, self.blocks, self.lengths, ids)

    def commit(self, timings: Timings) -> list[Committed]:
        """Context features of the anchors and of what stands are kept; tokens leave for the clients.

        Nothing else is kept. The target's keys and values of rejected rows need no clearing: the next round writes over
        them before anything reads them.
        """
        *first_rows, batch_tokens = [0, *accumulate(1 + length for length in self.lengths)]
        judged = [*map(Judged, self.streams, self.blocks, self.lengths, self.outcomes)]
        taps, alone = self.output.taps, batch_tokens == len(self.streams)
        if alone and all(s.drafts for s in self.streams):
            self.late_ms += self._context.keep_anchors(taps, self.streams, HANDED_A_ROUND)
        else:
            kept = [
                Part(s, row, 1 + outcome.accepted, s.position, soon=bool(block.tokens) and block.source == "model")
                for row, (s, block, _, outcome) in zip(first_rows, judged, strict=True)
                if s.drafts
            ]
            self.late_ms += self._context.keep(taps, kept, self.streams, HANDED_A_ROUND)
        history = self._models.history
        return settle(judged, history, timings, batch_tokens=batch_tokens, streams=len(self.streams))


WORDS = (Round.draft, Round.schedule, Round.verify, Round.accept)
"""And then `Round.commit`, which notes what they took."""
