"""Who is drafted for in a round, and how many tokens: decided before drafting, from the past alone.

*Ours*, not the paper's: the set of streams and the block length with the most expected tokens a second are taken. If
none is better than plain decoding, nobody is drafted for. A small share of time goes to looks: rounds that are
run another way than the best one, so that wrong costs or promises are found out. Decisions depend on past rounds alone,
so they are lossless under every verification.

Symbols: R streams, m of them may be drafted for, γ the block's size, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dspark_stream.load.acceptance import THRESHOLDS, Acceptance, Past
from dspark_stream.load.costs import COMPARED, CostTable, Shape
from dspark_stream.load.curve import Array, CapacityCurve, Company

# What follows was tried at half and at twice its value in replays of both pairs (docs/decisions/037).
HOLD = 8
"""Rounds between two decisions while the streams are the same ones."""
SHARE = 0.02
"""Of all time, so much may be lost to looks. What a look loses is estimated beforehand. Without looks 1.8 % of
throughput are lost."""
LEAST_LOSS = 0.1
"""A look costs at least so much of its time: where the two ways are equally good, little is won by looking."""


class Plan(NamedTuple):
    """Who is drafted for in a round, and how."""

    drafting: Sequence[bool]
    """Of every stream."""
    slots: int
    """Draft tokens of each of them."""
    price: float
    """Tokens a millisecond at this load. A draft token is verified if it promises more than its time at this price."""
    promised: Sequence[float] = ()
    """Accepted tokens expected of each stream's drafts, less the time of drafting at the price: what a looked-up draft
    has to beat. Zeros if nobody is drafted for. Empty in looks, which use the drafter alone."""

    @property
    def size(self) -> tuple[int, int]:
        """Streams that are drafted for, and slots of each; (0, 0) if there are none."""
        drafting = sum(self.drafting)
        return drafting, self.slots if drafting else 0


class _Choice(NamedTuple):
    plan: Plan
    rate: float
    """Tokens a millisecond."""
    ms: float


class Controller:
    """One for an engine.

    Args:
        gamma: the drafter's block size.
        curve: what rounds take, as measured.
    """

    def __init__(self, gamma: int, curve: CapacityCurve) -> None:
        self._gamma = gamma
        self.costs = CostTable(curve)
        self.acceptance = Acceptance(gamma)
        self._for: tuple[Past | None, ...] = ()
        self._plan = Plan((), 0, 0.0)
        self._left = 0
        """Rounds for which the plan still holds."""
        self._looking = False
        """Whether it is a look."""
        self._rounds = 0
        self._saved_ms = 0.0
        """What looks may lose now."""
        self._looks: dict[tuple[str, int], int] = {}
        """How often each kind was looked at, with streams of so many bits."""
        self.looks = 0

    # --- planning ----------------------------------------------------------------------------------------------

    def plan(self, pasts: Sequence[Past | None], company: Company, *, looks: bool = True) -> Plan:
        """The next round's. ``pasts``: of every stream, None for one that is never drafted for.

        ``looks``: whether the round may be one that only shows something.
        """
        present = tuple(pasts)
        self._left -= 1
        if present != self._for and self._left >= 0 and (self._looking or len(present) > HOLD):
            # the plan stands for those who stay: among many streams one comes or goes in nearly every round
            chosen = {past for past, drafts in zip(self._for, self._plan.drafting, strict=True) if drafts}
            drafting = [past in chosen for past in present]
            worth = dict(zip(self._for, self._plan.promised, strict=False))
            promised = [worth.get(past, 0.0) for past in present] if worth else ()
            self._plan = self._plan._replace(drafting=drafting, promised=promised)
        elif present != self._for or self._left < 0:
            self._plan, self._left = self._decide(pasts, company, looks)
        self._for = present
        return self._plan

    def _decide(self, pasts: Sequence[Past | None], company: Company, looks: bool) -> tuple[Plan, int]:
        """A plan, and the rounds after this one for which it holds."""
        self._looking = False
        self.costs.settle()
        streams, plain_ms = len(pasts), self.costs.plain_ms(company)
        nobody = _Choice(Plan([False] * streams, 0, streams / plain_ms, [0.0] * streams), streams / plain_ms, plain_ms)
        may = [r for r, past in enumerate(pasts) if past is not None]
        if not may:
            return nobody.plan, HOLD - 1
        drafts, whole = self._drafts([p for p in pasts if p is not None], may, company)
        best = drafts if drafts.rate > nobody.rate else nobody
        others = {"plain": nobody} if best is drafts else {"drafts": drafts}
        if whole.plan[:2] != best.plan[:2]:
            others["whole"] = whole
        look = self._look(best, others, pasts) if looks and others else None
        if look is not None:
            self._looking = True
            # a price near zero: everything is worth its time, so that the whole block is verified
            price = best.rate * (1e-3 if look is whole else 1.0)
            return look.plan._replace(price=price, promised=()), COMPARED - 1
        return best.plan._replace(price=best.rate), HOLD - 1

    def _drafts(self, pasts: Sequence[Past], may: Sequence[int], company: Company) -> tuple[_Choice, _Choice]:
        """The best set of streams and block length; and a whole block of the stream that drafted least."""
        alone, verified = expected = self.acceptance.expected(pasts)  # [m, T, γ]
        order = (THRESHOLDS[:, None] * verified - alone).argsort(axis=0)
        accepted, verified = np.take_along_axis(expected, order[None], axis=1).cumsum(axis=1)
        tokens = company.streams + accepted
        drafting = np.arange(1.0, len(may) + 1)[:, None, None]
        slots = np.arange(1.0, self._gamma + 1)
        ms = self.costs.round_ms(company, company.streams + verified, drafting, slots)
        rate: Array = tokens / ms

        n, t, g = (int(i) for i in np.unravel_index(int(rate.argmax()), rate.shape))
        chosen = {may[i]: i for i in order[: n + 1, t, g]}
        spent = float(rate[n, t, g] * self.costs.curve.drafting_ms(n + 1, g + 1, company)) / (n + 1)
        promised = [float(alone[chosen[r], t, g]) - spent if r in chosen else 0.0 for r in range(company.streams)]
        plan = Plan([r in chosen for r in range(company.streams)], g + 1, 0.0, promised)
        best = _Choice(plan, float(rate[n, t, g]), float(ms[n, t, g]))

        least = min(range(len(may)), key=lambda i: pasts[i].ledger.count)
        rows = np.array(company.streams + self._gamma)
        whole_ms = float(self.costs.round_ms(company, rows, np.array(1), np.array(self._gamma)))
        plan = Plan([r == may[least] for r in range(company.streams)], self._gamma, 0.0)
        return best, _Choice(plan, (company.streams + float(alone[least, 0, -1])) / whole_ms, whole_ms)

    def _look(self, best: _Choice, others: dict[str, _Choice], pasts: Sequence[Past | None]) -> _Choice | None:
        """The kind that was looked at least, if enough is saved up; the n-th look of a kind needs n times its cost."""
        bits = len(pasts).bit_length()
        kind = min(others, key=lambda kind: self._looks.get((kind, bits), 0))
        look, before = others[kind], self._looks.get((kind, bits), 0)
        drafted = zip(pasts, look.plan.drafting, best.plan.drafting, strict=True)
        owed = sum(past.owed for past, now, else_ in drafted if past is not None and now and not else_)
        lost_ms = COMPARED * look.ms * max(LEAST_LOSS, 1.0 - look.rate / best.rate)
        lost_ms += 1e-3 * self.costs.curve.feature_us * owed
        if self._saved_ms < lost_ms * (1 + before):
            return None
        self._saved_ms = 0.0
        self._looks[kind, bits] = before + 1
        self.looks += 1
        return look

    # --- learning ----------------------------------------------------------------------------------------------

    def learn(
        self,
        pasts: Sequence[Past | None],
        survivals: Sequence[Sequence[float]],
        lengths: Sequence[int],
        accepted: Sequence[int],
        shape: Shape,
        ms: float,
    ) -> None:
        """Learn from a round: each stream's promises (empty if it did not draft), verified and accepted tokens; its
        time."""
        for past, survival, length, took in zip(pasts, survivals, lengths, accepted, strict=True):
            if past is not None:
                self.acceptance.learn(past, survival, length, took)
        self._saved_ms += SHARE * ms / self.costs.pace
        self.costs.learn(shape, ms)
        self._rounds += 1
        if self._rounds % HOLD == 0:
            self.costs.settle()  # a static schedule never decides, but bounds and prompt chunks use the costs
