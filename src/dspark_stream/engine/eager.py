"""Rounds that are run operation by operation: planned, timed, and learnt from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf

from dspark_stream.decoding.schedule import Schedule
from dspark_stream.engine.context import Context
from dspark_stream.engine.prompts import prefill
from dspark_stream.engine.rounds import Committed, Models, RoundCounters, Timings, company_of
from dspark_stream.engine.step import WORDS, Round
from dspark_stream.engine.stream import Stream
from dspark_stream.load.controller import Plan
from dspark_stream.load.costs import Company, Shape


class EagerRounds:
    """`rounds.Rounds` on any runner.

    Args:
        models: what they work with.
        schedule: what the first ones go by.
        looks_up: whether drafts may be looked up in streams' own texts.
    """

    def __init__(self, models: Models, schedule: Schedule, *, looks_up: bool = True) -> None:
        self.models, self.schedule, self.looks_up = models, schedule, looks_up
        self.context = Context(models.drafter, models.drafter_kv)

    def decode(self, streams: Sequence[Stream], slowest_ms: float = inf) -> list[Committed]:
        """See `rounds.Rounds`."""
        begun = time.perf_counter()
        company = company_of(streams)
        plan = self._plan(streams, company, slowest_ms)
        run = Round(self.models, self.context, streams, company, plan, self.schedule, slowest_ms)
        draft_ms, _, verify_ms, accept_ms = [_took_ms(word, run) for word in WORDS]
        committed = run.commit(Timings(draft_ms, verify_ms + accept_ms))
        shape = Shape(company, *run.plan.size, len(streams) + sum(run.lengths))
        self._learn(run, shape, _since_ms(begun) - run.late_ms)
        return committed

    def prefill(self, shares: Sequence[tuple[Stream, int]], company: Sequence[Stream]) -> list[Committed]:
        """See `prompts.prefill`."""
        return prefill(self.models, self.context, shares, company)

    def prompt_ms(self, tokens: Sequence[int], position: int) -> list[float]:
        """See `rounds.Rounds`."""
        passes_ms = self.models.capacity.pass_ms(tokens, Company(1, position))
        return list(self.models.controller.costs.pace * passes_ms)

    def rest(self) -> None:
        """See `rounds.Rounds`."""
        self.models.controller.costs.rest()
        self.context.tell_apart()

    def forget(self) -> None:
        """See `rounds.Rounds`: a round that failed is over. What it left is found where streams are rewound."""
        self.context.tell_apart()

    def counters(self) -> RoundCounters:
        """See `rounds.Rounds`."""
        return RoundCounters(self.models.controller.looks, self.models.controller.costs.pace)

    def _plan(self, streams: Sequence[Stream], company: Company, slowest_ms: float) -> Plan:
        """Who is drafted for, from the past alone: everybody under a static schedule, else whoever it pays for."""
        controller = self.models.controller
        slots = self.schedule.slots(self.models.gamma)
        if slots is None:
            plan = controller.plan([s.past for s in streams], company, looks=slowest_ms == inf)
        else:
            plan = Plan([s.drafts and slots > 0 for s in streams], slots, 0.0)
        if not any(plan.drafting) or slowest_ms == inf:
            return plan
        costs = controller.costs
        owed = sum(self.context.owed([s for s, drafts in zip(streams, plan.drafting, strict=True) if drafts]))
        ms = costs.ms(Shape(company, *plan.size, len(streams))) + 1e-3 * self.models.capacity.feature_us * owed
        # where drafting alone would take too long, with nothing verified, nobody is drafted for
        if costs.pace * ms <= slowest_ms:
            return plan
        nobody = [False] * len(streams)
        return plan._replace(drafting=nobody, promised=[0.0] * len(streams) if plan.promised else ())

    def _learn(self, run: Round, shape: Shape, round_ms: float) -> None:
        """What this round took and what its drafts were worth goes into the decisions of later ones."""
        controller = self.models.controller
        survivals = [b.survival if b.source == "model" else () for b in run.blocks]
        accepted = [o.accepted for o in run.outcomes]
        pasts = [s.past for s in run.streams]
        controller.learn(zip(pasts, survivals, run.lengths, accepted, strict=True), shape, round_ms, run.late_ms)
        for stream, own, block, outcome in zip(run.streams, run.found, run.blocks, run.outcomes, strict=True):
            if own is not None:
                for repeats in (stream.repeats, controller.acceptance.repeats):
                    repeats.learn(own, [*block.tokens[: outcome.accepted], outcome.bonus])


def _took_ms(word: Callable[[Round], None], run: Round) -> float:
    begun = time.perf_counter()
    word(run)
    return _since_ms(begun)


def _since_ms(begun: float) -> float:
    return (time.perf_counter() - begun) * 1e3
