"""Which streams are drafted for in a round, and how many tokens: decided before drafting, from the past alone.

*Ours*: drafting costs something even where no draft is ever verified, so it has to pay at the load of the moment. Every
stream keeps what its drafts promised and brought; of all sets of streams, block lengths and thresholds the one with the
most tokens a second is taken. A stream that is left out is probed now and then, as far as a small budget of time goes;
and a few rounds are run the other way now and then, plain or with drafts, so that a wrong idea of costs is found out.

Only past rounds go in, so whatever is decided here is lossless under every verification.

Symbols: R streams, m of them may be drafted for, γ the block's size, G = γ slot counts, T thresholds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import exp
from typing import NamedTuple

import numpy as np

from dspark_stream.spec.capacity import Array, Costs, Outlay
from dspark_stream.spec.handicap import Handicap
from dspark_stream.spec.neighbours import WIDTH
from dspark_stream.types import Acceptance

THRESHOLDS: Array = np.array([0.0, 0.03, 0.07, 0.12, 0.18, 0.25, 0.33, 0.42, 0.52, 0.64, 0.78])
"""Survivals from which on verification could pay; what a round's schedule will do is foreseen by the best of them."""
STREAM_MEMORY, POOL_MEMORY = 32, 512
"""Drafted rounds after which what was seen counts half as much (e-fold): of one stream, and of all together."""
POOL_COUNTS_AS = 8.0
"""Drafted rounds of its own from which on a stream is judged more by itself than by all streams together."""
STALE_AFTER = 512
"""Rounds without drafts in which a stream's own past fades by the factor e."""
POOL_TAKES = 16
"""A stream's first drafts that all streams' past takes in, of later ones those of one round in so many: those that are
drafted for most are not what the next one is likely to be like."""
OPTIMISM = 0.7
"""Conditional acceptance that is believed in before anything was seen."""
WORTHWHILE = 1.01
"""Drafting must promise so many times the throughput of plain decoding: where it wins nothing, nothing is to be run."""
PLAN_HOLDS, REST_HOLDS = 16, 64
"""Rounds between two decisions while the streams are the same ones: with drafts to learn from, and without."""
PLAIN_LOOK, DRAFTS_LOOK = 4, WIDTH
"""The same of decisions that are made only to see what plain rounds take, or rounds with drafts."""
LOOK_SHARE, LOOK_MOST = 0.002, 2.5
"""Of the time of all plain rounds, what looks at drafts may lose by what is believed of them, and how many times such a
round is saved up for it. What the drafter has to catch up with is not counted: that would leave next to none."""
COMPANY_HOLDS, NOBODY_HOLDS = 8, 16
"""Rounds for which a plan stands at most while streams come and go, and for which a decision to draft for nobody does,
where there are three or more and they do not become fewer by more than a quarter."""
ANOTHER = 1.02
"""Where some of the costs that a plan was made by have changed by so many times what others have, it is made anew."""
LONGEST_HOLD = 32
"""A decision to draft for everybody, as before, holds twice as long, up to so many rounds: at one stream, deciding
takes a twentieth of a round."""
WHOLE_EVERY, WHOLE_LATER, EARLY = 16, 64, 128
"""Of so many rounds with drafts one drafts whole blocks, so that later slots stay known: of an engine's first ones, of
later ones, and how many are the first."""
PROBE_SHARE = 0.005
"""Of all decoding time, what probes may take to draft. What their tokens bring is not set off: that is in doubt where
probes are made, and the drafter is out of the caches there."""
PROBE_MOST = 0.25
"""Of a round's time, what one probe of several streams may take; one stream alone is probed whatever it takes."""
FIRST_WAIT, LONGEST_WAIT = 4, 512
"""Rounds until a stream that is not drafted for is due for a probe; doubled by every probe that changes nothing."""


class Tally:
    """What drafts promised and brought, fading: of one stream, or of all."""

    def __init__(self, gamma: int, memory: int) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._new: list[Sequence[float]] = []
        self.seen = 0.0
        """Rounds."""
        self.sums: Array = np.zeros((2, len(THRESHOLDS), gamma))
        """Over rounds in which the slot's promised survival was at least the threshold: that survival, and the
        rounds, [2, T, γ]."""
        self.promised = 0.0
        """Promised survival, summed over verified tokens."""
        self.accepted = 0.0
        """Those of them that were accepted."""

    def add(self, survival: Sequence[float], verified: int, accepted: int) -> None:
        """One drafted round: promised survival of all γ slots, of which so many were verified and accepted."""
        self._new.append(survival)
        if verified:
            self.promised = self._keep * self.promised + sum(survival[:verified])
            self.accepted = self._keep * self.accepted + accepted

    def fade(self, factor: float) -> None:
        """Let all of it count less."""
        self.sums *= factor
        self.seen *= factor
        self.promised *= factor
        self.accepted *= factor


def settle(tallies: Sequence[Tally]) -> None:
    """Take what was added into the sums, of many and all at once: a round has no time for arrays."""
    some = [tally for tally in tallies if tally._new]
    if not some:
        return
    rows = np.array([row for tally in some for row in tally._new])[:, None]  # [n, 1, γ]
    above = rows >= THRESHOLDS[:, None]  # [n, T, γ]
    counts = [len(tally._new) for tally in some]
    first = [0, *accumulate(counts[:-1])]
    weight = np.concatenate([_fading(tally._keep, n) for tally, n in zip(some, counts, strict=True)])
    counted = above * weight[:, None, None]
    promised = np.add.reduceat(counted * rows, first)
    counted, seen = np.add.reduceat(counted, first), np.add.reduceat(weight, first)
    for i, tally in enumerate(some):
        keep = tally._keep ** counts[i]
        tally.seen = keep * tally.seen + float(seen[i])
        tally.sums *= keep
        tally.sums[0] += promised[i]
        tally.sums[1] += counted[i]
        tally._new.clear()


@lru_cache(maxsize=256)
def _fading(keep: float, rounds: int) -> Array:
    """Weights of so many rounds, oldest first."""
    weights: Array = keep ** np.arange(rounds - 1, -1, -1, dtype=np.float64)
    return weights


class Tail:
    """How survival goes on past the slots that were drafted: the mean conditional promise of each slot, fading.

    Slots that are rarely drafted are known badly: by themselves they would stay what a few rounds made of them, and a
    block too short would keep itself so. A mean knows nothing of which rounds are the good ones, so the worth of later
    slots is rather under- than overrated.
    """

    def __init__(self, gamma: int, memory: int) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._before = [OPTIMISM**k for k in range(gamma)]
        self._after = [OPTIMISM * before for before in self._before]

    def see(self, survival: Sequence[float]) -> None:
        """A whole block."""
        for k in range(1, len(survival)):
            self._after[k] = self._keep * self._after[k] + survival[k]
            self._before[k] = self._keep * self._before[k] + survival[k - 1]

    def whole(self, survival: Sequence[float]) -> Sequence[float]:
        """The survival of all γ slots where only some were drafted."""
        if len(survival) == len(self._after):
            return survival
        row = [*survival]
        for k in range(len(row), len(self._after)):
            row.append(row[-1] * self._after[k] / self._before[k])
        return row


class DraftPast:
    """What one stream's drafts have been like. Kept by the stream, written by `Skipping`."""

    def __init__(self, gamma: int, acceptance: Acceptance) -> None:
        self.acceptance: Acceptance = acceptance
        self.tally = Tally(gamma, STREAM_MEMORY)
        self.survivals: deque[Sequence[float]] = deque([(), ()], maxlen=2)
        """Of the last two rounds, oldest first; empty for a round without drafts."""
        self.wait = 1
        """Rounds until the next probe is due, from the last draft on."""
        self.waited = 0
        self.owed = 0
        """Positions whose context features the drafter would be given first."""
        self.drafted = 0
        """Rounds in which it was drafted for."""


class Plan(NamedTuple):
    """Who is drafted for in a round, and how."""

    drafting: Sequence[bool]
    """Of every stream."""
    slots: int
    """Draft tokens of each of them."""
    paying: int
    """Those of them that pay; the others are drafted to see what they are like, and may be left out."""
    price: float
    """Tokens that a millisecond is worth at this load: the best throughput that the past lets expect."""


class _Outlook(NamedTuple):
    """Sets of streams in the order in which they are worth drafting for, at every threshold and block length."""

    order: np.ndarray
    """Streams by falling worth, [m, T, G]."""
    tokens: Array
    """Committed tokens of a round that drafts for the first n of them, [m, T, G]."""
    ms: Array
    """What it takes, in the mean."""


class Skipping:
    """Decides about drafting; one for an engine.

    Args:
        gamma: the drafter's block size.
    """

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma
        self._pools: dict[Acceptance, Tally] = {
            a: _optimistic(gamma) for a in ("greedy", "rejection", "coupled")
        }  # acceptance differs by how it is verified
        self._tails: dict[Acceptance, Tail] = {a: Tail(gamma, POOL_MEMORY) for a in self._pools}
        self._credit_ms = 0.0
        """What probes may still take."""
        self._to_lose_ms = 0.0
        """The same of looks at drafts."""
        self._for: tuple[DraftPast | None, ...] = ()
        self._age = self._holds = 0
        self._not_for = 0
        """Streams of the company of which the last decision was that drafts pay for none; 0 if it was another one."""
        self._costs: Costs | None = None
        """What the last decision was made by."""
        self._now: Costs | None = None
        """What its price was last told by."""
        self._price = 0.0
        """That of the decision."""
        self._steady = PLAN_HOLDS
        self._all_of: tuple[DraftPast | None, ...] = ()
        """The company of which the last decision drafted for everybody; it held for ``_steady`` rounds."""
        self._plan = Plan((), 0, 0, 0.0)
        self._drafted = 0
        """Rounds with drafts."""
        self._whole = False
        """Whether this round drafts whole blocks to see what they are like."""
        self.handicap = Handicap()
        self.probes = 0
        """Rounds that drafted for a stream only to look."""

    def plan(self, pasts: Sequence[DraftPast | None], position: float, costs: Costs) -> Plan:
        """The next round's. ``pasts``: of every stream, None for one that is never drafted for; all positions' mean."""
        plan = self._held(pasts, position, costs)
        every = WHOLE_EVERY if self._drafted < EARLY else WHOLE_LATER
        self._whole = (self._drafted + 1) % every == 0 and any(plan.drafting)
        return plan._replace(slots=self._gamma) if self._whole else plan

    def _held(self, pasts: Sequence[DraftPast | None], position: float, costs: Costs) -> Plan:
        """The plan at hand, or a new one where that has been held long enough."""
        present = tuple(pasts)
        self._age += 1
        same = present == self._for
        if self._stands(costs) and self._age < (self._holds if same else self._outlasts(len(present))):
            if same:
                return self._plan
            # somebody came or went: among many that is no reason yet to decide anew, who came is not drafted for
            chosen = {past for past, drafts in zip(self._for, self._plan.drafting, strict=True) if drafts}
            self._for, self._plan = present, self._plan._replace(drafting=[past in chosen for past in present])
            self._holds = min(self._holds, NOBODY_HOLDS)
            return self._plan
        self._for, self._costs, self._now, self._age, self._not_for = present, costs, costs, 0, 0
        self._plan, self._holds, looks = self._decide(pasts, position, costs)
        self._price = self._plan.price
        if looks:  # probes would spoil it
            return self._plan
        due = [
            r
            for r, past in enumerate(pasts)
            if past is not None and not self._plan.drafting[r] and past.waited + 1 >= past.wait
        ]
        return self._with_probes(due, pasts, position, costs) if due and self._credit_ms > 0 else self._plan

    def _stands(self, costs: Costs) -> bool:
        """Whether these costs leave the plan as it is: where all takes longer alike, only its price is another.

        Costs follow a machine's pace by steps, at times several a second: deciding at each would take longer than it
        wins.
        """
        if costs is not self._now:
            slower = None if self._costs is None else costs.slower(self._costs, ANOTHER)
            if slower is None:
                return False
            self._now, self._plan = costs, self._plan._replace(price=self._price / slower)
        return True

    def _outlasts(self, streams: int) -> int:
        """Rounds for which a plan stands even though the company has become another one, of so many."""
        if self._not_for and streams > 2 and 4 * streams >= 3 * self._not_for:
            return NOBODY_HOLDS  # at this load it did not pay, and it does no better with as many others
        return min(COMPANY_HOLDS, streams // 2)

    def corrected(self, past: DraftPast, survival: Sequence[float]) -> list[float]:
        """Promises times what such promises have been worth so far."""
        factor = self._correction(past)
        return [min(1.0, factor * a) for a in survival]

    def learn(
        self,
        pasts: Sequence[DraftPast | None],
        survivals: Sequence[Sequence[float]],
        lengths: Sequence[int],
        accepted: Sequence[int],
        ms: float,
    ) -> None:
        """What a round showed: promises of those that drafted (else empty), verified and accepted tokens, its time."""
        if any(past is not None for past in pasts):
            self._credit_ms = min(self._credit_ms + PROBE_SHARE * ms, PROBE_MOST * ms)
            if not any(survivals):
                self._to_lose_ms = min(self._to_lose_ms + LOOK_SHARE * ms, LOOK_MOST * ms)
        if self._whole and all(len(survival) < self._gamma for survival in survivals):
            self._whole = False  # there was no room for whole blocks: the next round is to make up for it
        else:
            self._drafted += any(survivals)
        for past, survival, length, took in zip(pasts, survivals, lengths, accepted, strict=True):
            if past is None:
                continue
            past.survivals.append(survival)
            if not survival:
                past.waited += 1
                continue
            if past.waited:
                settle([past.tally])
                past.tally.fade(exp(-past.waited / STALE_AFTER))
                past.waited = 0
            tail = self._tails[past.acceptance]
            if len(survival) == self._gamma:
                tail.see(survival)
            row = tail.whole(survival)
            past.tally.add(row, length, took)
            past.drafted += 1
            if past.drafted <= POOL_TAKES or past.drafted % POOL_TAKES == 0:
                self._pools[past.acceptance].add(row, length, took)

    # --- deciding ----------------------------------------------------------------------------------------

    def _decide(self, pasts: Sequence[DraftPast | None], position: float, costs: Costs) -> tuple[Plan, int, bool]:
        """A plan, the rounds for which it holds, and whether it is there only to look."""
        streams = len(pasts)
        may = [r for r, past in enumerate(pasts) if past is not None]
        outlay = costs.outlay(streams, position, len(may), self._gamma)
        plain = streams / outlay.plain_ms
        nobody = Plan([False] * streams, 0, 0, plain)
        if not may:
            return nobody, REST_HOLDS, False
        outlook = self._outlook([past for past in pasts if past is not None], streams, outlay)
        rate = outlook.tokens / outlook.ms
        n, t, g = np.unravel_index(int(rate.argmax()), rate.shape)
        chosen = {may[i] for i in outlook.order[: n + 1, t, g]}
        best = Plan([r in chosen for r in range(streams)], int(g) + 1, int(g) + 1, float(rate[n, t, g]))
        margin = best.price / (WORTHWHILE * plain)
        factor = self.handicap.factor(streams)
        if margin <= factor:
            self._all_of = ()
            loses_ms = DRAFTS_LOOK * float(outlook.ms[n, t, g]) * (1.0 - margin / factor)
            if loses_ms <= self._to_lose_ms and self.handicap.take_look(streams, margin):
                self._to_lose_ms -= loses_ms
                return best._replace(price=plain), DRAFTS_LOOK, True  # what is verified has to be worth plain rounds
            self._not_for = streams
            return nobody, REST_HOLDS, False
        if self.handicap.wants_plain(streams, margin):
            return nobody, PLAIN_LOOK, True
        for r in chosen:
            _of(pasts, r).wait = FIRST_WAIT
        everybody = self._for if n + 1 == len(may) else ()  # with somebody left out, probes are due now and then
        self._steady = min(2 * self._steady, LONGEST_HOLD) if everybody and everybody == self._all_of else PLAN_HOLDS
        self._all_of = everybody
        return best, self._steady, False

    def _outlook(self, pasts: Sequence[DraftPast], streams: int, outlay: Outlay) -> _Outlook:
        expected = self._expected(pasts)  # [3, m, T, G]
        order = (THRESHOLDS[:, None] * expected[1] - expected[0]).argsort(axis=0)
        ranked: Array = expected[:, order, np.arange(len(THRESHOLDS))[:, None], np.arange(self._gamma)]
        accepted, verified, variance = ranked.cumsum(axis=1)
        most = streams + np.multiply.outer(np.arange(1, len(pasts) + 1), np.arange(1, self._gamma + 1))[:, None]
        ms = mean_ms(streams + verified, variance, most, outlay) + outlay.beside_ms[:, None]
        return _Outlook(order, streams + accepted, ms)

    def _expected(self, pasts: Sequence[DraftPast]) -> Array:
        """Accepted and verified tokens that each stream's draft would bring, and the variance of the latter, by
        threshold and slots, [3, m, T, G]."""
        kinds = sorted({past.acceptance for past in pasts})
        pools = [self._pools[kind] for kind in kinds]
        settle([*pools, *(past.tally for past in pasts)])
        mine = [kinds.index(past.acceptance) for past in pasts]
        shared = np.array([POOL_COUNTS_AS / pool.seen * pool.sums for pool in pools])[mine]  # [m, 2, T, γ]
        weight = np.array([exp(-past.waited / STALE_AFTER) for past in pasts])
        sums = np.array([past.tally.sums for past in pasts]) * weight[:, None, None, None]
        seen = np.array([past.tally.seen for past in pasts]) * weight
        both = (sums + shared) / (seen + POOL_COUNTS_AS)[:, None, None, None]
        both[:, 0] *= np.array([self._correction(past) for past in pasts])[:, None, None]
        each: Array = np.minimum(both, 1.0).swapaxes(0, 1)  # of slots verified, their share of rounds is P(ℓ ≥ k)
        squares = each[1:] * np.arange(1, 2 * self._gamma, 2)  # E[ℓ²] = Σ (2k - 1)·P(ℓ ≥ k)
        expected: Array = np.concatenate([each, squares]).cumsum(axis=3)
        expected[2] = np.maximum(expected[2] - expected[1] ** 2, 0.0)
        return expected

    def _correction(self, past: DraftPast) -> float:
        """What a promise of this stream is worth: accepted over promised, leaning on all streams'."""
        pool = self._pools[past.acceptance]
        shared = (pool.accepted + 10.0) / (pool.promised + 10.0)
        return (past.tally.accepted + 12.0 * shared) / (past.tally.promised + 12.0)

    # --- probing -----------------------------------------------------------------------------------------

    def _with_probes(
        self, due: Sequence[int], pasts: Sequence[DraftPast | None], position: float, costs: Costs
    ) -> Plan:
        """The plan with the ``due`` streams, or with the one that waited longest; the budget may go below zero."""
        plan = self._plan
        chosen = sorted(due, key=lambda r: -_of(pasts, r).waited)
        took_ms = self._probe_ms(plan, chosen, pasts, position, costs)
        if took_ms > PROBE_MOST * len(pasts) / plan.price:
            chosen = chosen[:1]
            took_ms = self._probe_ms(plan, chosen, pasts, position, costs)
        self._credit_ms -= took_ms
        self.probes += 1
        for r in chosen:
            past = _of(pasts, r)
            past.wait = min(2 * max(past.wait, FIRST_WAIT), LONGEST_WAIT)
        probed = set(chosen)
        return Plan(
            [drafts or r in probed for r, drafts in enumerate(plan.drafting)], self._gamma, self._gamma, plan.price
        )

    def _probe_ms(
        self, plan: Plan, chosen: Sequence[int], pasts: Sequence[DraftPast | None], position: float, costs: Costs
    ) -> float:
        """Time that drafting for ``chosen`` as well takes, what they have missed included."""
        drafting = sum(plan.drafting)
        more_ms = costs.draft_ms(drafting + len(chosen), self._gamma, position)
        if drafting:
            more_ms = more_ms - costs.draft_ms(drafting, plan.slots, position)
        missed = sum(_of(pasts, r).owed for r in chosen)
        return max(0.0, float(more_ms)) + 1e-3 * costs.curve.feature_us * missed


def mean_ms(batch_tokens: Array, variance: Array, most: Array, outlay: Outlay) -> Array:
    """A target pass in the mean over rounds whose B has that mean and variance, and is never above ``most``.

    Where the curve bends upwards, a round of three tokens and one of five take longer than two of four. Two sizes stand
    for all: a standard deviation to either side of the mean, moved where that is beyond what rounds can have. Streams'
    lengths count as independent.
    """
    spread = np.sqrt(variance)
    above = np.maximum(spread, variance / (batch_tokens - outlay.tokens[0] + 1e-9))
    above = np.minimum(above, most - batch_tokens) + 1e-9
    below = variance / above
    at = np.interp([batch_tokens - below, batch_tokens + above], outlay.tokens, outlay.verify_ms)
    mean: Array = at[0] + (at[1] - at[0]) * below / (below + above)
    return mean


def _of(pasts: Sequence[DraftPast | None], r: int) -> DraftPast:
    past = pasts[r]
    assert past is not None
    return past


def _optimistic(gamma: int) -> Tally:
    tally = Tally(gamma, POOL_MEMORY)
    tally.add([OPTIMISM**k for k in range(1, gamma + 1)], 0, 0)
    return tally
