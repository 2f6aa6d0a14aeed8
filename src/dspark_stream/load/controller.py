"""Who is drafted for in a round, and how many tokens: decided before drafting, from the past alone.

*Ours*, not the paper's: the set of streams and the block length with the most expected tokens a second are taken. If
none is better than plain decoding, nobody is drafted for. A small share of time goes to looks: rounds that are run
another way than the best one, so that wrong costs or promises are found out. See docs/decisions/037.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dspark_stream.load.acceptance import THRESHOLDS, Acceptance, Past
from dspark_stream.load.costs import LOOK, CapacityCurve, Company, CostTable, Shape

Learnt = tuple[Past | None, Sequence[float], int, int]  # past, promises (none if no draft), verified, accepted
HOLD = 8  # 4: +0.2 %, 16: -0.2 % of all replays' throughput; so are all such figures (decision 037)
"""Rounds between two decisions; not fewer than there are streams, since deciding takes time for each."""
OTHERS = 0.25  # 0: 0.0 %; 0.5: -0.4 %, the least ratio to plain 0.95 instead of 0.97
"""It is decided at once where those who have come and those who have gone are more than this share of the streams."""
SHARE = 0.02  # 0.01: 0.0 %, the least ratio to plain 0.89 instead of 0.97; 0.04: -0.1 %; none: -0.2 %, 0.87
"""Of all time, so much may be lost to looks. What a look loses is estimated beforehand; this share of it at least."""


class Plan(NamedTuple):
    """Who is drafted for in a round, and how."""

    drafting: Sequence[bool]  # of every stream
    slots: int  # draft tokens of each of them
    price: float
    """Tokens a millisecond. A draft token is verified if it promises more than its time at this price."""
    promised: Sequence[float] = ()
    """Accepted tokens expected of each stream's drafts, less the time of drafting at the price: what a looked-up draft
    has to beat. Zeros if nobody is drafted for. Empty in looks, which use the drafter alone."""

    @property
    def size(self) -> tuple[int, int]:
        """Streams that are drafted for, and slots of each; (0, 0) if there are none."""
        drafting = sum(self.drafting)
        return drafting, self.slots if drafting else 0


class _Choice(NamedTuple):
    promised: dict[Past | None, float]  # by who is drafted for
    slots: int
    rate: float  # tokens a millisecond; the plan's price
    ms: float
    look: bool = False

    def plan(self, pasts: Sequence[Past | None]) -> Plan:
        promised = [*map(self.promised.get, pasts)]
        drafting = [one is not None for one in promised]
        return Plan(drafting, self.slots, self.rate, () if self.look else [one or 0.0 for one in promised])


class Controller:
    """One for an engine of R streams. ``gamma``: the drafter's block size; ``curve``: what rounds take, as measured."""

    def __init__(self, gamma: int, curve: CapacityCurve) -> None:
        self._gamma = gamma
        self.costs = CostTable(curve)
        self.acceptance = Acceptance(gamma)
        self._choice, self._left = _Choice({}, 0, 0.0, 0.0), 0  # for how many rounds
        self._for, self._plain = set[Past | None](), 0  # who they are; how many of them are in plain mode
        self._may_lose_ms, self.looks = 0.0, 0  # looks in all
        self._looked = Counter[tuple[bool, int]]()  # by kind and the bits of R; the n-th needs n times its loss

    def plan(self, pasts: Sequence[Past | None], company: Company, *, looks: bool = True) -> Plan:
        """The next round's; ``looks``: it may be one. ``pasts``: of every stream, None for one in plain mode."""
        others = len(self._for.symmetric_difference(pasts)) + abs(self._plain - pasts.count(None))
        gone = not self._choice.promised.keys() <= set(pasts)
        if self._left == 0 or (gone if self._choice.look else others > OTHERS * len(pasts)):
            self._choice = self._decide(pasts, company, looks)
            self._for, self._plain = set(pasts), pasts.count(None)
            self._left = LOOK if self._choice.look else max(HOLD, len(pasts))
        self._left -= 1
        return self._choice.plan(pasts)

    def _decide(self, pasts: Sequence[Past | None], company: Company, looks: bool) -> _Choice:
        streams, ms = len(pasts), self.costs.plain_ms(company)
        plain = _Choice({}, 0, streams / ms, ms)
        may = [past for past in pasts if past is not None]
        if not may:
            return plain
        drafts, whole = self._drafts(may, company)
        best = drafts if drafts.rate > plain.rate else plain
        kinds = {(c is whole, streams.bit_length()): c for c in (whole, plain) if c is not best}
        kind = min(kinds, key=self._looked.__getitem__)
        look, times = kinds[kind], 1 + self._looked[kind]
        if not looks or self._may_lose_ms < LOOK * times * look.ms * max(SHARE, 1.0 - look.rate / best.rate):
            return best
        self.looks, self._may_lose_ms, self._looked[kind] = self.looks + 1, 0.0, times
        # a price near zero: everything is worth its time, so that the whole block is verified
        return look._replace(rate=best.rate * (1e-3 if look is whole else 1.0), look=True)

    def _drafts(self, may: Sequence[Past], company: Company) -> tuple[_Choice, _Choice]:
        """The best set of streams and block length; and a whole block of the stream that drafted least."""
        streams, gamma, costs = company.streams, self._gamma, self.costs
        expected = [self.acceptance.expected(past) for past in may]
        most = int(sum(rows[0][-1] for _, rows in expected)) + 2
        passes, draft_ms = costs.passes(company, slice(most), drafted=True), costs.drafting_ms(company)
        best = 0.0, 0.0, 0, 0, list[int]()
        for t, least in enumerate(THRESHOLDS):
            gains = [tokens[t][-1] - least * rows[t][-1] for tokens, rows in expected]
            ranked = sorted(range(len(may)), key=gains.__getitem__, reverse=True)
            for g in range(gamma):
                tokens, rows = float(streams), 0.0
                for n, i in enumerate(ranked, 1):
                    tokens += expected[i][0][t][g]
                    rows += expected[i][1][t][g]
                    more = int(rows)
                    (low_ms, low), (high_ms, high) = passes[more : more + 2]
                    ms = low * (low_ms + draft_ms[n][g + 1])
                    ms += (rows - more) * (high * (high_ms + draft_ms[n][g + 1]) - ms)
                    if tokens > best[0] * ms:
                        best = tokens / ms, ms, t, g, ranked[:n]
        rate, ms, t, g, drafting = best
        spent = rate * draft_ms[len(drafting)][g + 1] / len(drafting)
        promised: dict[Past | None, float] = {may[i]: expected[i][0][t][g] - spent for i in drafting}

        i, seldom = min(enumerate(may), key=lambda place: (place[1].count, -place[0]))  # of those, the last to come
        whole_ms = costs.ms(Shape(company, 1, gamma, streams + gamma))
        whole = _Choice({seldom: 0.0}, gamma, (streams + expected[i][0][0][-1]) / whole_ms, whole_ms)
        return _Choice(promised, g + 1, rate, ms), whole

    def learn(self, rounds: Iterable[Learnt], shape: Shape, ms: float, late_ms: float = 0.0) -> None:
        """Learn from a round of every stream; the time of the whole, and what catching up took besides."""
        for past, survival, verified, accepted in rounds:
            if past is not None:
                self.acceptance.learn(past, survival, verified, accepted)
        self._may_lose_ms += (SHARE * ms - self._choice.look * late_ms) / self.costs.pace
        self.costs.learn(shape, ms)
