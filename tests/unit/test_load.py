"""Who is drafted for and how much, by what past rounds showed: played against machines and drafts that are known."""

from __future__ import annotations

import itertools
import random
from math import exp
from typing import NamedTuple

import msgspec
import numpy as np
import pytest

from dspark_stream.decoding.schedule import Adaptive, Candidate
from dspark_stream.decoding.survival import AcceptanceHistory, prefix_survival
from dspark_stream.load.acceptance import THRESHOLDS, Acceptance, Past
from dspark_stream.load.controller import Controller, Plan
from dspark_stream.load.costs import CapacityCurve, Company, CostTable, Shape

GAMMA = 4
GOOD, BAD = [0.9, 0.8, 0.7, 0.6], [0.08, 0.02, 0.01, 0.01]
IDLE = CapacityCurve(
    tokens=[1, 2, 4, 8, 16, 32, 64], verify_ms=[5.0, 5.1, 5.2, 5.3, 5.5, 5.7, 6.0],
    streams=[1, 4, 16], draft_ms=[1.0, 2.5, 9.0], slot_ms=[0.2, 0.5, 2.0], gamma=GAMMA,
)  # fmt: skip
"""Verification is nearly free, drafting costs a fifth of a pass."""
BUSY = msgspec.structs.replace(
    IDLE, verify_ms=[5.0 + 3.0 * (n - 1) for n in IDLE.tokens], draft_ms=[1.0, 4.0, 16.0]
)  # fmt: skip
"""Every row costs three fifths of the first."""


class Played(NamedTuple):
    """A round as it came out."""

    plan: Plan
    verified: int
    tokens: float
    ms: float
    """Without noise."""


class Machine:
    """Plays rounds of streams that promise one thing and keep it or another, on a machine that takes what ``truth``
    says times what ``noise`` makes of it; the controller was given ``curve``."""

    def __init__(self, truth, curve=None, noise=lambda: 1.0):
        self.table, self.noise = CostTable(truth), noise
        self.controller = Controller(GAMMA, curve or truth)

    def play(self, pasts, rounds, promises, kept=None):
        company, controller = Company(len(pasts), 96.0), self.controller
        played = []
        for _ in range(rounds):
            plan = controller.plan(pasts, company)
            rows = [p[: plan.slots] if drafts else [] for p, drafts in zip(promises, plan.drafting, strict=True)]
            those = [
                Candidate(controller.acceptance.corrected(past, row), True) if row else Candidate(())
                for past, row in zip(pasts, rows, strict=True)
            ]
            lengths = Adaptive().lengths(those, controller.costs.round_cost(company, *plan.size), plan.price)
            took = [sum(row[:length]) for row, length in zip(kept or promises, lengths, strict=True)]
            shape = Shape(company, *plan.size, len(pasts) + sum(lengths))
            ms = self.table.ms(shape)
            controller.learn(zip(pasts, rows, lengths, took, strict=True), shape, ms * self.noise())
            played.append(Played(plan, sum(lengths), len(pasts) + sum(took), ms))
        return played

    def corrections(self, streams=1, slots=GAMMA):
        """Times as long as by the curve: plain rounds, and rounds with everything drafted and verified."""
        table, company = self.controller.costs, Company(streams, 96.0)
        curve = CostTable(table.curve)
        dear = Shape(company, streams, slots, streams * (1 + slots))
        return table.plain_ms(company) / curve.plain_ms(company), table.ms(dear) / curve.ms(dear)


def pasts(count, way="greedy"):
    return [Past(GAMMA, way) for _ in range(count)]


def share(played, r=0):
    return sum(one.plan.drafting[r] for one in played) / len(played)


def rate(played):
    return sum(one.tokens for one in played) / sum(one.ms for one in played)


# --- who is drafted for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 6])
def test_drafts_that_pay_are_made_and_drafts_that_do_not_are_not(streams):
    for promise, truth, low, high in (
        (GOOD, IDLE, 0.95, 1.0),  # all but looks
        (BAD, IDLE, 0.0, 0.05),
        ([0.5, 0.1, 0.05, 0.01], BUSY, 0.0, 0.05),
    ):
        machine, those = Machine(truth), pasts(streams)
        machine.play(those, 100, [promise] * streams)
        played = machine.play(those, 300, [promise] * streams)
        assert all(low <= share(played, r) <= high for r in range(streams))


def test_ties_go_to_plain():
    """Guards against work for nothing: a draft that brings as much as it costs is left out."""
    free = msgspec.structs.replace(IDLE, verify_ms=[4.0] * 7, draft_ms=[4.0] * 3, slot_ms=[1.0] * 3)
    for accepted, drafts in ((0.25, False), (0.26, True)):  # one slot: 1 ms beside 4
        controller = Controller(GAMMA, free)
        controller.acceptance.expected = lambda _, a=accepted: ([[a] * GAMMA] * len(THRESHOLDS),) * 2
        assert any(controller.plan(pasts(1), Company(1, 96.0)).drafting) is drafts


def test_a_few_who_come_or_go_among_many_wait_for_the_next_decision():
    """Guards against a decision a round where many streams come and go, and against one that few streams wait for."""
    controller = Controller(GAMMA, IDLE)
    # drafting pays for everybody
    controller.acceptance.expected = lambda _: ([[0.9 * k for k in range(1, GAMMA + 1)]] * len(THRESHOLDS),) * 2
    many = pasts(8)
    assert controller.plan(many, Company(8, 96.0), looks=False).drafting == [True] * 8
    changed = controller.plan([*many[:0:-1], *pasts(1)], Company(8, 96.0), looks=False)
    assert changed.drafting == [True] * 7 + [False]
    assert changed.promised[0] > 0.0
    assert changed.promised[-1] == 0.0
    assert controller.plan(many[1:], Company(7, 96.0), looks=False).drafting == [True] * 7
    others = [*many[2:], *pasts(2)]
    assert controller.plan(others, Company(8, 96.0), looks=False).drafting == [True] * 8
    alone = pasts(1)
    price = controller.plan(alone, Company(1, 96.0), looks=False).price
    for plain in (31, 0):  # those in plain mode count
        plan = controller.plan([*alone, *[None] * plain], Company(1 + plain, 96.0), looks=False)
        assert (plan.price == pytest.approx(price)) is (plain == 0)


@pytest.mark.parametrize(("streams", "good"), [(4, [1]), (8, [5, 6, 7])])
def test_streams_are_told_apart(streams, good):
    """Guards against one verdict for all: those whose drafts hold are drafted for, those beside them are not, however
    much the drafts of the former are most of what was seen."""
    machine, those = Machine(IDLE), pasts(streams)
    promises = [[0.99, 0.98, 0.97, 0.96] if r in good else BAD for r in range(streams)]
    machine.play(those, 500, promises)
    played = machine.play(those, 400, promises)
    for r in range(streams):
        assert share(played, r) > 0.95 if r in good else share(played, r) < 0.05


@pytest.mark.parametrize("way", ["greedy", "rejection", "coupled"])
def test_promises_that_are_not_kept_count_for_what_they_brought(way):
    """Guards against a drafter that is sure of itself and wrong: other languages, other domains."""
    machine, those = Machine(IDLE), pasts(1, way)
    machine.play(those, 200, [GOOD], [[0.0] * GAMMA])
    assert share(machine.play(those, 200, [GOOD], [[0.0] * GAMMA])) < 0.1
    assert machine.controller.acceptance.corrected(those[0], GOOD)[0] < 0.4


def test_what_promises_are_worth_is_each_streams_own_and_a_newcomers_is_all_the_others():
    acceptance, (liar, honest, newcomer, other) = Acceptance(GAMMA), [*pasts(3), *pasts(1, "coupled")]
    for _ in range(60):
        acceptance.learn(liar, GOOD, GAMMA, 0)
        acceptance.learn(honest, GOOD, GAMMA, 3)
    worths = [acceptance.worth(past) for past in (liar, newcomer, honest)]
    assert worths[0] < 0.15 < worths[1] < 0.85 < worths[2]
    assert acceptance.worth(other) == pytest.approx(1.0)  # drafts of another way of accepting say nothing of it
    assert max(acceptance.corrected(honest, [1.0, 1.0])) <= 1.0


def test_slots_that_were_not_drafted_go_on_as_whole_blocks_did():
    """Guards against a block that keeps itself short, since nobody would know what later slots promise."""
    acceptance, (whole, short) = Acceptance(GAMMA), pasts(2)
    for _ in range(100):
        acceptance.learn(whole, [0.8, 0.4, 0.2, 0.1], 1, 1)
    for _ in range(100):
        acceptance.learn(short, [0.4], 1, 0)
    (accepted, *_), (verified, *_) = acceptance.expected(short)  # by threshold and slots: how many survive it
    promised = [tokens / acceptance.worth(short) for tokens in accepted]
    assert promised == pytest.approx([0.4, 0.6, 0.7, 0.75], rel=0.2)
    assert verified == pytest.approx([1, 2, 3, 4])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("block", [[0.8, 0.4, 0.2, 0.1], GOOD])
def test_later_slots_are_known_from_few_whole_blocks_among_many_short_ones(block, late):
    """Guards against a block that keeps itself short, since nobody would know what later slots promise: whether whole
    blocks come before the short ones, or a few of them after many."""
    acceptance, (whole, short) = Acceptance(GAMMA), pasts(2)
    first, then = [(whole, block)] * (30 if late else 100), [(short, block[:1])] * 300
    for past, promise in [*then, *first, *then[:100]] if late else [*first, *then]:
        acceptance.learn(past, promise, 1, 1)
    (accepted, *_), (verified, *_) = acceptance.expected(short)  # by threshold and slots: how many survive it
    promised = [tokens / acceptance.worth(short) for tokens in accepted]
    assert promised == pytest.approx(list(itertools.accumulate(block)), rel=0.2)
    assert verified == pytest.approx([1, 2, 3, 4])


def test_a_stream_left_out_is_looked_at_again_and_taken_back():
    """Guards against a verdict for ever: drafts that begin to hold are found out, alone or beside others' that do."""
    for promises, r in (([BAD], 0), ([GOOD, BAD, GOOD], 1)):
        machine, those = Machine(IDLE), pasts(len(promises))
        machine.play(those, 200, promises)
        assert share(machine.play(those, 300, promises), r) < 0.1
        played = machine.play(those, 1500, [GOOD] * len(promises))
        assert share(played[-200:], r) > 0.9
        assert machine.controller.looks > 0


@pytest.mark.parametrize(("truth", "streams"), [(IDLE, 1), (BUSY, 8)])
def test_looks_keep_within_their_share_of_time(truth, streams):
    """Guards against what is lost by looking where there is nothing to find, and against never looking."""
    machine, those = Machine(truth), pasts(streams)
    machine.play(those, 100, [BAD] * streams)
    before = machine.controller.looks
    played = machine.play(those, 3000, [BAD] * streams)
    plain = streams / machine.table.plain_ms(Company(streams, 96.0))
    assert 0.97 * plain < rate(played) <= plain
    assert machine.controller.looks > before
    assert all(share(played, r) < 0.03 for r in range(streams))


def churning(machine, promise, rounds):
    """Streams of which one comes or goes every round."""
    those, played = pasts(4), []
    for i in range(rounds):
        if i % 2:
            del those[0]
        else:
            those.append(*pasts(1))
        played += machine.play(those, 1, [promise] * len(those))
    return played


def test_looks_get_somewhere_while_streams_come_and_go():
    """Guards against looks for which the streams would have to stay the same ones, and against more of them where every
    round is decided anew."""
    machine = Machine(BUSY)
    played = churning(machine, BAD, 3000)
    plain_ms = {n: machine.table.plain_ms(Company(n, 96.0)) for n in (4, 5)}
    best = sum(one.tokens * plain_ms[len(one.plan.drafting)] / len(one.plan.drafting) for one in played)
    assert machine.controller.looks > 5
    assert 0.98 < best / sum(one.ms for one in played) <= 1.0

    # where drafting brings little, it is not always known
    for promise, least in (([0.6, 0.2, 0.05, 0.01], 0.9), ([0.4, 0.1, 0.05, 0.01], 0.6)):
        for learns in (True, False):
            wrong = Machine(IDLE, DEAR_DRAFTS)
            if not learns:
                wrong.controller.costs.learn = lambda *_: None
            played = churning(wrong, promise, 2000)
            drafted = sum(any(one.plan.drafting) for one in played) / len(played)
            assert drafted > least if learns else drafted < 0.1


def test_who_comes_and_goes_is_not_mixed_up():
    """Guards against pasts by batch row instead of by stream."""
    machine, those, promises = Machine(IDLE), pasts(8), [GOOD if r > 4 else BAD for r in range(8)]
    machine.play(those, 300, promises)
    found = {id(past): [0, 0] for past in those}
    chance = random.Random(3)
    for _ in range(120):
        here = chance.sample(range(8), chance.randint(3, 8))
        present = [those[r] for r in here]
        for one in machine.play(present, 2, [promises[r] for r in here]):
            assert len(one.plan.drafting) == len(here)
            for past, drafts in zip(present, one.plan.drafting, strict=True):
                found[id(past)][0] += drafts
                found[id(past)][1] += 1
    shares = [drafted / rounds for drafted, rounds in (found[id(past)] for past in those)]
    assert min(shares[5:]) > 0.9
    assert max(shares[:5]) < 0.15  # a decision for every company, and looks


def test_streams_in_plain_mode_are_never_drafted_for():
    machine, (one,) = Machine(IDLE), pasts(1)
    controller, company = machine.controller, Company(3, 96.0)
    drafted = 0
    for i in range(400):
        plan = controller.plan([None, one, None], company)
        assert (plan.drafting[0], plan.drafting[2]) == (False, False)
        rows = [[], GOOD[: plan.slots] if plan.drafting[1] else [], []]
        took = [0, len(rows[1]) * (i % 3 > 0), 0]
        shape = Shape(company, *plan.size, 3 + len(rows[1]))
        seen = [(None, [], 0, 0), (one, rows[1], len(rows[1]), took[1]), (None, [], 0, 0)]
        controller.learn(seen, shape, machine.table.ms(shape))
        drafted += plan.drafting[1]
    assert drafted > 300
    assert controller.plan([None, None], Company(2, 96.0)).size == (0, 0)


def test_short_blocks_where_later_slots_are_worth_nothing_and_long_ones_once_they_are():
    """Guards against slots that nobody verifies where each of them costs, and against never looking at them again."""
    machine, those = Machine(IDLE), pasts(1)
    machine.play(those, 200, [[0.95, 0.02, 0.01, 0.01]])
    slots = [one.plan.size[1] for one in machine.play(those, 400, [[0.95, 0.02, 0.01, 0.01]])]
    assert slots.count(1) > 0.9 * len(slots)
    slots = [one.plan.size[1] for one in machine.play(those, 1500, [GOOD])]
    assert slots[-200:].count(GAMMA) > 150


@pytest.mark.parametrize("sure", [0.9, 0.05])
def test_a_drafter_without_confidence_is_judged_by_its_history(sure):
    """Its promises are what the past had, so they say nothing of the round at hand: the past alone decides."""
    machine, those, history, chance = Machine(IDLE), pasts(2), AcceptanceHistory(GAMMA), random.Random(5)
    drafted = []
    for _ in range(500):
        promise = prefix_survival(history.confidence())
        stood = [next((k for k in range(GAMMA) if chance.random() > sure), GAMMA) for _ in those]
        (one,) = machine.play(those, 1, [promise] * 2, [[1.0] * n + [0.0] * (GAMMA - n) for n in stood])
        length = one.verified // 2
        if any(one.plan.drafting):
            for n in stood:
                history.record(length, min(n, length))
        drafted.append(any(one.plan.drafting))
    late = sum(drafted[200:]) / 300
    assert late > 0.9 if sure > 0.5 else late < 0.1


# --- what rounds take ----------------------------------------------------------------------------------------


DEAR_DRAFTS = msgspec.structs.replace(IDLE, draft_ms=[4.0, 10.0, 36.0], slot_ms=[0.8, 2.0, 8.0])
DEAR_PASSES = msgspec.structs.replace(IDLE, verify_ms=[5.0, 10.2, 10.4, 10.6, 11.0, 11.4, 12.0])


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(
    ("curve", "promise", "streams"),
    [
        (DEAR_DRAFTS, [0.3, 0.1, 0.05, 0.01], 1),
        (DEAR_DRAFTS, [0.4, 0.1, 0.05, 0.01], 4),
        (DEAR_PASSES, [0.7, 0.2, 0.05, 0.01], 1),
    ],
)
def test_a_table_that_makes_drafts_or_some_passes_too_dear_is_found_out(curve, promise, streams, learns):
    """Guards against a verdict that rules out the very rounds that would show it wrong."""
    machine, those = Machine(IDLE, curve), pasts(streams)
    if not learns:
        machine.controller.costs.learn = lambda *_: None
    machine.play(those, 1500, [promise] * streams)
    drafted = share(machine.play(those, 300, [promise] * streams))
    assert drafted > 0.9 if learns else drafted < 0.1


@pytest.mark.parametrize("curve", [IDLE, BUSY])
def test_a_table_that_makes_drafts_too_cheap_is_found_out(curve):
    """Guards against a curve that flatters drafting for as long as the service runs."""
    truth = msgspec.structs.replace(curve, draft_ms=[5 * ms for ms in curve.draft_ms], slot_ms=[0.2, 0.5, 2.0])
    promise = [0.7, 0.2, 0.05, 0.01]
    machine, those = Machine(truth, curve), pasts(1)
    first = machine.play(those, 20, [promise])
    assert curve is BUSY or share(first) > 0.5
    machine.play(those, 500, [promise])
    assert share(machine.play(those, 300, [promise])) < 0.1


class Swings:
    """Phases of random length in which all rounds take up to twice as long alike, and some jitter."""

    def __init__(self, seed, jitter=0.03):
        self.chance, self.jitter, self.left, self.pace = random.Random(seed), jitter, 0, 1.0

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            self.left, self.pace = self.chance.randint(10, 200), self.chance.choice([1.0, 1.0, 1.4, 2.0])
        return self.pace * exp(self.chance.gauss(0.0, self.jitter))


@pytest.mark.parametrize(("promise", "streams"), [(GOOD, 1), ([0.3, 0.1, 0.02, 0.01], 1), (GOOD, 6)])
def test_a_machine_that_swings_changes_the_pace_and_no_choice(promise, streams):
    """Guards against a plain round of a fast second held against drafts of a slow one."""
    steady, swinging = Machine(IDLE), Machine(IDLE, noise=Swings(streams))
    paces = []
    rates = []
    for machine in (steady, swinging):
        those, played = pasts(streams), []
        for _ in range(40):
            played += machine.play(those, 40, [promise] * streams)
            paces.append(machine.controller.costs.pace)
            assert machine.corrections(streams) == pytest.approx((1.0, 1.0), abs=0.08)
        rates.append(rate(played))
    assert rates[1] == pytest.approx(rates[0], rel=0.02)
    assert paces[:40] == pytest.approx([1.0] * 40, abs=0.01)
    assert max(paces) > 1.6
    assert min(paces[40:]) < 1.1


def test_one_interrupted_round_moves_little():
    slow = iter([])
    machine, those = Machine(IDLE, noise=lambda: next(slow, 1.0)), pasts(1)
    machine.play(those, 300, [GOOD])
    for times in (50.0, 5000.0):
        slow = iter([times])
        machine.play(those, 40, [GOOD])
        assert machine.corrections() == pytest.approx((1.0, 1.0), abs=0.08)
    assert machine.controller.costs.pace == pytest.approx(1.0, abs=0.05)
    slow = iter([1e-3])
    machine.play(those, 40, [GOOD])
    assert machine.corrections() == pytest.approx((1.0, 1.0), abs=0.08)


def test_what_drafting_costs_is_learnt_from_neighbouring_rounds():
    """Guards against plain rounds that are held to be dear because drafting is."""
    table, company = CostTable(IDLE), Company(1, 96.0)
    shapes = [Shape(company, n, 3 * n, rows) for n, rows in ((0, 1), (0, 4), (1, 4), (1, 1)) for _ in range(4)]
    before = [table.ms(shape) for shape in shapes]
    for shape, ms in zip(shapes * 40, before * 40, strict=True):
        table.learn(shape, ms * (1.5 if shape.drafting else 1.0))
    true = [ms * (1.5 if shape.drafting else 1.0) for shape, ms in zip(shapes, before, strict=True)]
    assert [table.pace * table.ms(shape) for shape in shapes] == pytest.approx(true, rel=0.02)


def test_a_size_that_is_corrected_takes_along_what_lies_beyond_it():
    """Guards against a curve that was measured beside a neighbour: it is wrong over a range, not at a point."""
    table, company = CostTable(IDLE), Company(1, 96.0)
    small, large = Shape(company, 1, 1, 2), Shape(company, 1, GAMMA, 8)

    def now() -> np.ndarray:
        return np.array([table.ms(Shape(company, 0, 0, b)) for b in IDLE.tokens])

    before = now()
    for shape, ms in (*[(small, table.ms(small))] * 2, (large, 1.5 * table.ms(large))):
        table.learn(shape, ms)
    up, down = (now() / before)[3:], (now() / before)[:2]
    assert up == pytest.approx([up[0]] * len(up))
    assert down == pytest.approx([down[0]] * 2)
    assert down[0] < 1 < up[0]


def test_a_size_that_only_looks_have_is_not_booked_as_cheap_drafting():
    """Guards against drafts at a loss because rounds of 23 rows, which looks alone have, are quicker than believed."""
    table, company = CostTable(BUSY), Company(4, 96.0)
    plain, small, look = Shape(company, 0, 0, 4), Shape(company, 1, 1, 4), Shape(company, 1, GAMMA, 4 + GAMMA)
    true = {shape: table.ms(shape) * (0.8 if shape is look else 1.0) for shape in (plain, small, look)}
    for _ in range(60):
        for shape, rounds in ((plain, 8), (look, 2), (plain, 8), (small, 8)):
            for _ in range(rounds):
                table.learn(shape, true[shape])
    assert [table.pace * table.ms(shape) for shape in true] == pytest.approx([*true.values()], rel=0.03)


def test_what_drafting_costs_at_one_load_says_nothing_of_another():
    """Guards against eight streams that draft at a loss for what was learnt of one stream alone."""
    table = CostTable(IDLE)
    one, eight = (Shape(Company(n, 96.0), n, 3, n) for n in (1, 8))
    before = table.ms(one), table.ms(eight)
    for _ in range(20):
        for _ in range(2):
            table.learn(Shape(one.company, 0, 0, 1), table.plain_ms(one.company))
        for _ in range(2):
            table.learn(one, 0.7 * before[0])
    assert table.ms(one) < 0.8 * before[0]
    assert table.ms(eight) == before[1]


def test_the_first_round_after_others_that_drafted_is_not_compared():
    """Guards against plain decoding that is held to be dear, since its weights are in no cache where it begins."""
    table, company = CostTable(IDLE), Company(1, 96.0)
    shapes = Shape(company, 0, 0, 1), Shape(company, 1, 3, 4)
    before = [table.ms(shape) for shape in shapes]
    for _ in range(20):
        for shape, ms in zip(shapes, before, strict=True):
            for times in (1.4, 1.0, 1.0):
                table.learn(shape, times * ms)
    assert [table.ms(shape) for shape in shapes] == before


def test_rounds_that_others_lie_between_are_not_compared():
    """Guards against a machine that changed while kinds took turns: none of those rounds counted."""
    table, company = CostTable(IDLE), Company(1, 96.0)
    plain, drafts = Shape(company, 0, 0, 1), Shape(company, 1, 3, 4)
    before = [table.ms(shape) for shape in (plain, drafts)]
    for shape, times in [(drafts, 1.0)] * 3 + [(plain, 1.2), (drafts, 1.2)] * 25 + [(plain, 1.4)] * 3:
        table.learn(shape, times * before[shape is drafts])
    assert [table.ms(shape) for shape in (plain, drafts)] == before


def test_a_look_goes_on_until_it_shows_what_rounds_take():
    """Guards against looks of which nothing is compared: at drafting and at plain decoding, while others change."""
    for curve, promise in ((BUSY, BAD), (IDLE, GOOD)):
        machine, those, rounds = Machine(curve), pasts(4), []
        for _ in range(1500):
            those = [*those[1:], *pasts(1)]
            rounds += machine.play(those, 1, [promise] * 4)
        by_look = itertools.groupby(rounds, key=lambda one: not one.plan.promised)
        sizes = [[one.plan.size for one in some] for look, some in by_look if look]
        assert len(sizes) > 2
        assert all(len(some) >= 2 and len(set(some)) == 1 for some in sizes)


def test_a_look_ends_where_the_stream_that_it_drafts_for_has_gone():
    """Guards against looks at drafting that draft for nobody."""
    machine, rounds = Machine(BUSY), []
    for _ in range(1500):
        rounds += machine.play(pasts(1), 1, [BAD])
    looks = [one.plan.size for one in rounds if not one.plan.promised]
    assert len(looks) > 2
    assert all(drafting == 1 for drafting, _ in looks)


def test_rounds_before_and_after_a_rest_are_not_neighbours():
    """Guards against hours in which the machine changed, held against the first round's drafts."""
    for rests in (False, True):
        table, company = CostTable(IDLE), Company(1, 96.0)
        plain, drafts = Shape(company, 0, 0, 1), Shape(company, 1, 3, 4)
        before = table.ms(drafts)
        for _ in range(2):
            table.learn(plain, table.ms(plain))
        if rests:
            table.rest()
        for _ in range(2):
            table.learn(drafts, 2 * before)
        assert (table.ms(drafts) == before) is rests


def test_price_is_the_throughput_that_the_past_lets_expect():
    machine, those, company = Machine(IDLE), pasts(2), Company(2, 96.0)
    plain = machine.controller.plan([None, None], company).price
    assert plain == pytest.approx(2 / machine.table.plain_ms(company))
    machine.play(those, 200, [GOOD] * 2)
    played = machine.play(those, 200, [GOOD] * 2)
    prices = [one.plan.price for one in played if one.plan.size == (2, GAMMA)]
    assert max(prices) == pytest.approx(rate(played), rel=0.05)
    assert max(prices) > 1.5 * plain


def test_no_price_buys_what_a_bound_forbids():
    """Guards against looks at a whole block that keep readers waiting: every price of a plan is more than nothing."""
    machine = Machine(BUSY)
    played = machine.play(pasts(2), 400, [GOOD, BAD])
    prices = {one.plan.price for one in played}
    assert min(prices) < 0.01 < max(prices)
    bounded = machine.controller.costs.round_cost(Company(1, 96.0), 1, GAMMA).within(0.0)
    for exact in (True, False):
        for price in prices:
            assert Adaptive().lengths([Candidate(GOOD, exact)], bounded, price) == [0]


def test_no_look_where_rounds_are_bounded():
    machine = Machine(BUSY)
    for _ in range(600):
        company, own = Company(1, 96.0), pasts(1)
        machine.controller.plan(own, company, looks=False)
        machine.controller.learn([(own[0], (), 0, 0)], Shape(company, 0, 0, 1), 5.0)
    assert machine.controller.looks == 0


def looks_of(machine, those, rounds, late_ms=0.0):
    """Rounds that were looks, where nobody's drafts are worth it."""
    found, company = [], Company(len(those), 96.0)
    for i in range(rounds):
        plan = machine.controller.plan(those, company)
        shape = Shape(company, *plan.size, len(those) + sum(plan.drafting) * plan.slots)
        seen = [(past, BAD if d else (), GAMMA * d, 0) for past, d in zip(those, plan.drafting, strict=True)]
        machine.controller.learn(seen, shape, machine.table.ms(shape), late_ms if any(plan.drafting) else 0.0)
        if any(plan.drafting):
            found.append(i)
            assert plan.promised == ()  # a look is at the drafter: nothing is looked up
    return found


def test_catching_up_for_a_look_delays_the_next_one():
    quick, slow = (looks_of(Machine(BUSY), pasts(1), 2000, late) for late in (0.0, 100.0))
    assert len(slow) < 0.7 * len(quick)


def test_what_catching_up_takes_where_all_draft_is_no_looks_debt():
    """Guards against a schedule of fixed length after which the adaptive one would not look for minutes."""
    machine, own = Machine(BUSY), pasts(1)
    for _ in range(200):
        machine.controller.learn([(own[0], BAD, GAMMA, 0)], Shape(Company(1, 96.0), 1, GAMMA, 5), 18.0, 50.0)
    assert looks_of(machine, pasts(1), 200)


def test_a_new_load_is_looked_at_soon_however_often_the_old_one_was():
    machine = Machine(BUSY)
    looks_of(machine, pasts(1), 6000)
    late = looks_of(machine, pasts(1), 600)
    assert len(looks_of(machine, pasts(8), 600)) > 2 * len(late)


def test_what_was_long_ago_counts_no_more():
    acceptance, (one,) = Acceptance(GAMMA), pasts(1)
    for accepted, count in ((3, 300), (0, 100)):
        for _ in range(count):
            acceptance.learn(one, GOOD, GAMMA, accepted)
    assert acceptance.worth(one) < 0.1


def test_a_promise_that_is_no_number_spoils_no_other():
    acceptance, (own, other) = Acceptance(GAMMA), pasts(2)
    for _ in range(3):
        acceptance.learn(own, [0.9, float("nan"), float("nan"), float("nan")], 2, 1)
    acceptance.learn(other, GOOD, 4, 3)
    assert acceptance.corrected(own, [float("nan")]) == [0.0]
    assert 0 < acceptance.corrected(other, GOOD)[0] < 1
    assert all(n >= 0 for past in (own, other) for kind in acceptance.expected(past) for row in kind for n in row)
