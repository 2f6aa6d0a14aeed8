"""Who is drafted for: decided from the past, by what pays at the load of the moment."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from dspark_stream.spec.capacity import CapacityCurve, Costs, Outlay
from dspark_stream.spec.handicap import FIRST_LOOK, LAST_LOOK, Handicap, Shape
from dspark_stream.spec.skipping import (
    LONGEST_HOLD,
    LONGEST_WAIT,
    NOBODY_HOLDS,
    PLAIN_LOOK,
    PLAN_HOLDS,
    REST_HOLDS,
    STREAM_MEMORY,
    THRESHOLDS,
    WHOLE_LATER,
    DraftPast,
    Skipping,
    Tail,
    Tally,
    mean_ms,
    settle,
)

GAMMA = 4
GOOD, BAD = [0.9, 0.8, 0.7, 0.6], [0.1, 0.02, 0.01, 0.01]
IDLE = CapacityCurve(
    tokens=[1, 64], verify_ms=[5.0, 6.0], streams=[1, 16], stream_ms=[0.0, 0.1], draft_ms=[1.0, 9.0], gamma=GAMMA
)
"""Verification is nearly free, drafting costs a fifth of a pass."""
BUSY = msgspec.structs.replace(IDLE, verify_ms=[5.0, 5.0 + 63 * 3.0], draft_ms=[1.0, 16.0])
"""Every row costs three fifths of the first."""


COSTS: dict[int, Costs] = {}
"""Of every curve, by identity: other costs are another machine."""


def pasts(count, acceptance="greedy"):
    return [DraftPast(GAMMA, acceptance) for _ in range(count)]


def drive(skipping, streams, rounds, curve, survivals, accepted=None):
    """Plays rounds: stream r's drafts always promise ``survivals[r]`` and keep it, or bring ``accepted[r]``."""
    costs = COSTS.setdefault(id(curve), Costs(curve))
    plans = []
    for _ in range(rounds):
        plan = skipping.plan(streams, 100.0, costs)
        plans.append(plan)
        drafted = [survivals[r][: plan.slots] if drafts else [] for r, drafts in enumerate(plan.drafting)]
        lengths = [sum(a > 0.2 for a in row) for row in drafted]
        took = [
            sum(row[:n]) if accepted is None else min(n, accepted[r])
            for r, (row, n) in enumerate(zip(drafted, lengths, strict=True))
        ]
        skipping.learn(streams, drafted, lengths, took, 5.0)
        skipping.handicap.see(round_of(len(streams), any(drafted)), 5.0, 5.0)
    return plans


def share(plans, r=0):
    return sum(plan.drafting[r] for plan in plans) / len(plans)


def test_drafts_that_pay_are_made_and_drafts_that_do_not_are_not():
    for survival, curve, low, high in (
        (GOOD, IDLE, 0.97, 1.0),  # all but the looks at plain rounds
        (BAD, IDLE, 0.0, 0.05),
        ([0.5, 0.1, 0.05, 0.01], BUSY, 0.0, 0.05),
    ):
        skipping, streams = Skipping(GAMMA), pasts(1)
        drive(skipping, streams, 100, curve, [survival])
        assert low <= share(drive(skipping, streams, 400, curve, [survival])) <= high


def test_streams_are_told_apart():
    """Guards against one verdict for all: the one whose drafts hold is drafted for, its neighbours are not."""
    skipping, streams = Skipping(GAMMA), pasts(4)
    survivals = [BAD, GOOD, BAD, BAD]
    drive(skipping, streams, 300, IDLE, survivals)
    plans = drive(skipping, streams, 300, IDLE, survivals)
    assert share(plans, 1) > 0.97
    assert max(share(plans, r) for r in (0, 2, 3)) < 0.2


def test_promises_that_are_not_kept_count_for_what_they_brought():
    """Guards against a drafter that is sure of itself and wrong: other languages, other domains."""
    skipping, streams = Skipping(GAMMA), pasts(1)
    drive(skipping, streams, 200, IDLE, [GOOD], accepted=[0])
    assert share(drive(skipping, streams, 200, IDLE, [GOOD], accepted=[0])) < 0.1
    assert skipping.corrected(streams[0], GOOD)[0] < 0.3


def test_a_skipped_stream_is_probed_and_taken_back():
    """Guards against a verdict for ever: drafts that begin to hold are found out."""
    skipping, streams = Skipping(GAMMA), pasts(1)
    drive(skipping, streams, 300, IDLE, [BAD])
    assert not any(drive(skipping, streams, 1, IDLE, [BAD])[-1].drafting)
    plans = drive(skipping, streams, 3000, IDLE, [GOOD])
    assert share(plans[-300:]) > 0.9
    assert skipping.probes > 0


def test_probes_keep_within_their_budget_and_back_off():
    skipping, streams = Skipping(GAMMA), pasts(8)
    drive(skipping, streams, 400, BUSY, [BAD] * 8)
    before, rounds = skipping.probes, 4000
    plans = drive(skipping, streams, rounds, BUSY, [BAD] * 8)
    drafted = sum(sum(plan.drafting) for plan in plans)
    assert drafted / (8 * rounds) < 0.01
    assert 0 < skipping.probes - before < rounds / REST_HOLDS
    assert all(1 < past.wait <= LONGEST_WAIT for past in streams)
    assert max(past.waited for past in streams) < 4000  # nobody is forgotten


def test_short_blocks_where_later_slots_are_never_worth_it():
    """Guards against drafting slots that nobody verifies, where each of them costs."""
    curve = msgspec.structs.replace(IDLE, slot_ms=[0.25, 0.5])
    skipping, streams = Skipping(GAMMA), pasts(1)
    survival = [0.95, 0.02, 0.01, 0.01]
    drive(skipping, streams, 300, curve, [survival])
    slots = [plan.slots for plan in drive(skipping, streams, 10 * PLAN_HOLDS, curve, [survival]) if any(plan.drafting)]
    assert slots.count(1) >= 0.8 * len(slots) > 0


def test_streams_in_plain_mode_are_never_drafted_for():
    skipping, (one,) = Skipping(GAMMA), pasts(1)
    streams = [None, one, None]
    for plan in drive(skipping, streams, 50, IDLE, [[], GOOD, []])[PLAIN_LOOK:]:
        assert list(plan.drafting) == [False, True, False]
    assert not any(skipping.plan([None, None], 10.0, Costs(IDLE)).drafting)


class Counted(Skipping):
    """Counts its decisions."""

    decisions = 0

    def _decide(self, *args):
        self.decisions += 1
        return super()._decide(*args)


def decided(skipping, streams, curve, survivals, drafting):
    """On to the first round of a decision, with no probe in it, that drafts for streams that ``drafting`` likes."""
    for _ in range(500):
        before = skipping.decisions, skipping.probes
        plan = drive(skipping, streams, 1, curve, survivals)[-1]
        after = skipping.decisions, skipping.probes
        if after == (before[0] + 1, before[1]) and drafting(list(plan.drafting)):
            return plan
    pytest.fail("no such decision")


def test_who_comes_and_goes_does_not_mix_up_who_is_who():
    """Guards against pasts by batch row instead of by stream: a decision that still holds follows its stream."""
    skipping, streams = Counted(GAMMA), pasts(8)
    survivals = [GOOD if r > 4 else BAD for r in range(8)]
    plan = decided(skipping, streams, IDLE, survivals, lambda who: all(who[5:]) and not all(who))
    chosen = [past for past, drafts in zip(streams, plan.drafting, strict=True) if drafts]
    before = skipping.decisions
    for present in (streams[3:], streams[::-1]):
        plan = skipping.plan(present, 100.0, COSTS[id(IDLE)])
        assert [past for past, drafts in zip(present, plan.drafting, strict=True) if drafts] == [
            past for past in present if past in chosen
        ]
    assert skipping.decisions == before


def test_another_pace_changes_the_price_at_once_and_decides_nothing():
    """Guards against a price that outlives what rounds cost, and against a decision for every step of the pace."""
    skipping, streams = Counted(GAMMA), pasts(1)
    drive(skipping, streams, 20 * PLAN_HOLDS, IDLE, [GOOD])
    plan = decided(skipping, streams, IDLE, [GOOD], all)
    before = skipping.decisions
    for pace in (3.0, 1.5):
        slow = Costs(IDLE.scaled(pace, [1.0, 1.0], [1.0, 1.0]))
        for _ in range(2):
            again = skipping.plan(streams, 100.0, slow)
            assert again.price == pytest.approx(plan.price / pace)
            assert (again.drafting, again.paying) == (plan.drafting, plan.paying)
    assert skipping.decisions == before


def test_another_machine_is_decided_about_at_once():
    """Guards against plans that go by what parts of a round used to cost beside each other, in whatever company."""
    skipping, streams = Counted(GAMMA), pasts(6)
    drive(skipping, streams, 20 * PLAN_HOLDS, IDLE, [GOOD] * 6)
    decided(skipping, streams, IDLE, [GOOD] * 6, all)
    before = skipping.decisions
    for share, decisions in ((1.01, 0), (1.03, 1)):  # of what passes take, drafts take so much more
        apart = Costs(IDLE.scaled(1.0, [1.0, 1.0], [share, share]))
        skipping.plan(streams, 100.0, apart)
        assert skipping.decisions == before + decisions
    skipping.plan(streams[1:], 100.0, apart)
    assert skipping.decisions == before + 1
    skipping.plan(streams, 100.0, Costs(IDLE))  # another company and other costs in one
    assert skipping.decisions == before + 2


def test_decisions_that_come_out_alike_hold_longer():
    """Deciding takes time; another company is decided about anew, and so is one of which somebody is left out."""
    skipping, streams = Counted(GAMMA), pasts(1)
    drive(skipping, streams, 10 * PLAN_HOLDS, IDLE, [GOOD])
    before = skipping.decisions
    drive(skipping, streams, 10 * LONGEST_HOLD, IDLE, [GOOD])
    assert 10 <= skipping.decisions - before <= 14
    before = skipping.decisions
    drive(skipping, pasts(1), 3 * PLAN_HOLDS, IDLE, [GOOD])
    assert skipping.decisions - before == 2
    four = pasts(4)
    drive(skipping, four, 10 * LONGEST_HOLD, IDLE, [GOOD, GOOD, GOOD, BAD])
    before = skipping.decisions
    plans = drive(skipping, four, 10 * PLAN_HOLDS, IDLE, [GOOD, GOOD, GOOD, BAD])
    assert share(plans, 3) < 0.5
    assert skipping.decisions - before == 10


def test_nobody_is_drafted_for_however_they_come_and_go_and_a_few_are_looked_at_anew():
    """Guards against a decision for every stream that comes where drafting pays for none, and against missing that it
    does once most have gone."""
    skipping, streams = Counted(GAMMA), pasts(8)
    drive(skipping, streams, 4 * REST_HOLDS, BUSY, [BAD] * 8)
    before, plans = skipping.decisions, []
    for turn in range(4 * NOBODY_HOLDS):  # one goes, another comes
        if turn % 2:
            streams = [*streams[1:], *pasts(1)]
            plans += drive(skipping, streams, 1, BUSY, [BAD] * 8)
        else:
            plans += drive(skipping, streams[1:], 1, BUSY, [BAD] * 7)
    assert skipping.decisions - before <= 5
    assert sum(map(any, (plan.drafting for plan in plans))) <= 4  # probes
    before = skipping.decisions
    drive(skipping, streams[:5], 1, BUSY, [BAD] * 5)
    assert skipping.decisions == before + 1


def test_price_is_the_throughput_that_the_past_lets_expect():
    skipping, streams = Skipping(GAMMA), pasts(2)
    plain = skipping.plan([None, None], 0.0, Costs(IDLE)).price
    assert plain == pytest.approx(2 / Costs(IDLE).verify_ms(2, 2, 0.0))
    plans = drive(skipping, streams, 200, IDLE, [GOOD, GOOD])
    assert plans[-1].price == pytest.approx((2 + 2 * sum(GOOD)) / IDLE.round_ms(10, 2, 2), rel=0.1)


def test_a_tally_fades_and_its_sums_do_not_depend_on_when_they_are_taken():
    one, other = Tally(2, 10), Tally(2, 10)
    for k in range(20):
        one.add([0.1 * (k % 5), 0.05], 1, k % 2)
        settle([one])
        other.add([0.1 * (k % 5), 0.05], 1, k % 2)
    settle([other])
    assert one.seen == pytest.approx(10 * (1 - 0.9**20))
    assert other.seen == pytest.approx(one.seen)
    assert other.sums == pytest.approx(one.sums)
    assert other.sums[1, 0, 0] == pytest.approx(other.seen)  # every round is at least 0
    assert other.sums[0, 0, 1] / other.seen == pytest.approx(0.05)
    before = one.sums.copy()
    one.fade(0.5)
    assert one.sums == pytest.approx(0.5 * before)


def test_slots_that_were_not_drafted_go_on_as_whole_blocks_did():
    """Guards against a block that keeps itself short: few rounds say what later slots promise, and may say it badly."""
    tail = Tail(3, 100)
    for _ in range(50):
        tail.see([0.8, 0.4, 0.1])
        tail.see([0.4, 0.2, 0.05])
    assert tail.whole([0.6]) == pytest.approx([0.6, 0.3, 0.075], rel=0.03)
    assert tail.whole([0.6, 0.6]) == pytest.approx([0.6, 0.6, 0.15], rel=0.03)
    assert tail.whole([0.6, 0.5, 0.4]) == [0.6, 0.5, 0.4]


def test_whole_blocks_are_looked_at_now_and_then():
    """Guards against later slots that nobody looks at any more once they were bad."""
    curve = msgspec.structs.replace(IDLE, slot_ms=[0.25, 0.5])
    skipping, streams = Skipping(GAMMA), pasts(1)
    drive(skipping, streams, 300, curve, [[0.95, 0.02, 0.01, 0.01]])
    slots = [plan.slots for plan in drive(skipping, streams, 10 * WHOLE_LATER, curve, [GOOD])]
    assert slots[0] < GAMMA
    assert slots[-WHOLE_LATER + 1 :].count(GAMMA) > WHOLE_LATER / 2


@pytest.mark.parametrize("room", [0, 1])
def test_a_whole_block_gives_way_and_is_made_up_for(room):
    """Guards against looks that are lost where a bound on the gap between chunks has room for ``room`` slots only."""
    curve = msgspec.structs.replace(IDLE, slot_ms=[0.25, 0.5])
    skipping, streams, costs = Skipping(GAMMA), pasts(1), Costs(curve)
    short = [0.95, 0.02, 0.01, 0.01]
    looks = 0
    for _ in range(300):
        plan = skipping.plan(streams, 100.0, costs)
        assert plan.paying <= plan.slots
        looks += plan.paying < plan.slots == GAMMA
        slots = min(plan.slots, room) if plan.paying < plan.slots else plan.slots
        row = short[:slots] if plan.drafting[0] else []
        skipping.learn(streams, [row], [min(1, len(row))], [min(1, len(row))], 5.0)
        skipping.handicap.see(round_of(1, bool(row)), 5.0, 5.0)
    assert looks > 150  # due until it was had


# --- what the curve does not know ----------------------------------------------------------------------------


def round_of(streams, drafted):
    return Shape(streams, 100.0, streams if drafted else 0, 2 if drafted else 0, streams * (3 if drafted else 1))


def seen(pairs, handicap=None):
    """A handicap after rounds of (streams, drafted, times as long as expected)."""
    handicap = handicap or Handicap()
    for streams, drafted, times in pairs:
        handicap.see(round_of(streams, drafted), 5.0 * times, 5.0)
    return handicap


def turns(streams, times, count=8):
    """So many turns of six plain rounds and six with drafts, which take ``times`` as long as they should."""
    return ([(streams, False, 1.0)] * 6 + [(streams, True, times)] * 6) * count


def test_rounds_with_drafts_are_held_against_the_plain_ones_beside_them():
    assert Handicap().factor(2) == 1.0
    assert seen(turns(2, 1.1)).factor(2) == pytest.approx(1.1, rel=0.01)
    assert 1.05 < seen(turns(2, 1.1, 1)).factor(2) < 1.09  # one change of kinds is not believed all of it
    slower = seen([(2, kind, 1 + 0.01 * i) for i, (_, kind, _) in enumerate(turns(2, 1.0))])
    assert slower.factor(2) == pytest.approx(1.0, abs=0.03)  # the whole machine slows down, from 1 to 2
    assert seen([(2, True, 1.2)] * 20).factor(2) == 1.0  # nothing to hold it against


def test_a_machine_that_swings_is_no_handicap():
    """Guards against plain rounds of a fast second held against drafts of a slow one, and the other way round."""
    for times in (1.0, 1.1):
        handicap, found = seen(turns(2, times)), []
        for swing in range(40):  # in blocks of 50 rounds, whatever is running
            pace = 1.4 if swing % 2 else 1.0
            kinds = [(2, (swing * 50 + i) % 130 >= 6, pace) for i in range(50)]
            for _, drafted, slow in kinds:
                seen([(2, drafted, slow * (times if drafted else 1.0))], handicap)
            found.append(handicap.factor(2))
        assert found == pytest.approx([times] * len(found), abs=0.05)


def test_other_numbers_of_streams_are_a_first_guess():
    handicap = seen(turns(2, 1.1))
    assert handicap.factor(3) == pytest.approx(1.1, rel=0.02)
    seen(turns(3, 1.0), handicap)
    assert handicap.factor(3) < 1.03
    assert handicap.factor(2) > 1.07


def test_one_interrupted_round_moves_little_and_nothing_moves_it_out_of_reach():
    handicap = seen(turns(2, 1.0))
    seen([*[(2, False, 1.0)] * 6, (2, True, 50.0), *[(2, False, 1.0)] * 6], handicap)
    assert handicap.factor(2) < 1.02
    seen(turns(2, 50.0, 40), handicap)
    assert handicap.factor(2) < 1.3


def test_a_plain_round_right_after_drafts_is_not_the_measure():
    handicap = seen([*turns(2, 1.0), *[(2, True, 1.0), (2, False, 1.5)] * 40])
    assert handicap.factor(2) == pytest.approx(1.0, abs=0.01)


def test_looks_end_where_groups_of_two_sizes_take_turns():
    handicap = seen([(4, True, 1.0), (2, False, 1.0)] * 2)
    assert not handicap.wants_plain(2, 1.0)


def test_after_long_without_drafts_a_few_probes_tell():
    for plain, low, high in ((6, 1.12, 1.16), (2000, 1.0, 1.1)):
        handicap = seen([*turns(2, 1.2, 40), *[(2, False, 1.0)] * plain])
        assert handicap.factor(2) == pytest.approx(1.2, abs=0.01)
        for _ in range(4):  # probes that take what the curve says
            seen([(2, True, 1.0), *[(2, False, 1.0)] * 20], handicap)
        assert low < handicap.factor(2) < high


def test_a_handicap_is_held_against_the_curve_of_the_moment():
    """A drift of everything leaves it as it is; one that takes in what it had shown leaves nothing of it."""
    curve = msgspec.structs.replace(IDLE, rest_ms=[0.0, 0.0])
    before, shape = Costs(curve), round_of(2, True)
    handicap = seen(turns(2, 1.2, 40))
    handicap.rebase(before, Costs(curve.scaled(1.0, [1.3] * len(IDLE.tokens), [1.3] * len(IDLE.streams))))
    assert handicap.factor(2) == pytest.approx(1.2, abs=0.02)
    assert not handicap.wants_plain(2, 1.0)
    handicap = seen(turns(2, 1.2, 40))
    drafting = float(before.draft_ms(2, 2, 100.0))
    times = 1 + 0.2 * shape.ms(before) / drafting
    dearer = Costs(curve.scaled(1.0, [1.0] * len(IDLE.tokens), [times] * len(IDLE.streams)))
    handicap.rebase(before, dearer)
    assert handicap.factor(2) == pytest.approx(1.0, abs=0.02)


def test_a_change_of_kinds_across_a_rebase_is_held_against_the_new_curve():
    curve = msgspec.structs.replace(IDLE, rest_ms=[0.0, 0.0])
    before, after = Costs(curve), Costs(curve.scaled(1.0, [1.0, 1.0], [1.8, 1.8]))
    handicap = Handicap()
    for times in (1, 5):  # rounds take what `after` says: once held against the one curve, then against the other
        costs = before if times == 1 else after
        for drafted in (False, True):
            shape = round_of(2, drafted)
            for _ in range(6 if not drafted else 3 if times == 1 else 6):
                handicap.see(shape, shape.ms(after), shape.ms(costs))
        if times == 1:
            handicap.rebase(before, after)
    assert handicap.factor(2) == pytest.approx(1.0, abs=0.01)


def test_looks_are_due_less_and_less_often():
    """Guards against looks that are never due again, and against ones that go on as often as at first."""
    handicap, due = Handicap(), []
    since = 0
    for _ in range(4000):
        look = handicap.wants_plain(2, 1.1)
        if look:
            due.append(since)
            since = 0
            seen([(2, False, 1.0)] * 4, handicap)
        seen([(2, True, 1.0)], handicap)
        since += 1
    assert due[:7] == [0, 16, 32, 64, 128, 256, 512]
    assert due[1] == FIRST_LOOK
    assert set(due[7:]) == {LAST_LOOK}


def test_looks_at_drafts_are_due_less_and_less_often():
    """Numbers of streams with as many bits share their looks: 64 of them would take more than they are worth."""
    handicap, due, plain = Handicap(), [], 0
    for i in range(3000):
        seen([(4 + i % 4, False, 1.0)], handicap)
        plain += 1
        if handicap.take_look(5, 0.9):
            due.append(plain)
            plain = 0
            seen([*[(5, False, 1.0)] * 5, *[(5, True, 1.0)] * 5], handicap)
    assert due[0] == FIRST_LOOK
    assert due[1:6] == [33, 65, 129, 257, 513]  # the first plain round after drafts does not count
    assert set(due[5:]) == {LAST_LOOK + 1}
    assert not Handicap().take_look(4, 0.9)


def test_a_look_that_did_not_come_about_is_due_again_as_soon():
    handicap = seen([(4, False, 1.0)] * FIRST_LOOK)
    assert handicap.take_look(4, 0.9)
    seen([(4, False, 1.0)] * (FIRST_LOOK - 1), handicap)  # something was in the way
    assert not handicap.take_look(4, 0.9)
    assert seen([(4, False, 1.0)], handicap).take_look(4, 0.9)


def test_nothing_is_looked_at_right_after_drafts():
    """It would tell nothing: there are no plain rounds beside it."""
    handicap = seen([*[(4, False, 1.0)] * 100, *[(4, True, 1.0)] * 5])
    assert not handicap.take_look(4, 0.9)
    probed = seen([*[(4, False, 1.0)] * 100, (4, True, 1.0)])
    assert probed.take_look(4, 0.9)


def test_looks_at_drafts_lose_no_more_than_their_share(monkeypatch):
    """Of the time of plain rounds."""
    looks = []
    monkeypatch.setattr(Handicap, "take_look", lambda *_: looks.append(1) or True)
    skipping, streams = Skipping(GAMMA), pasts(8)
    drive(skipping, streams, 10_000, msgspec.structs.replace(BUSY, verify_ms=[5.0, 5.0 + 63 * 1.5]), [BAD] * 8)
    assert 0 < len(looks) < 20  # 144 if they cost nothing


def test_nobody_looks_for_what_could_not_change_a_decision():
    assert Handicap().wants_plain(1, 1.2)
    assert not Handicap().wants_plain(1, 1.3)  # no handicap of 1.3 would be believed
    handicap = seen([(1, False, 1.0)] * 2000)
    assert not handicap.take_look(1, 0.77)
    assert handicap.take_look(1, 0.79)


@pytest.mark.parametrize("looks", [True, False])
def test_a_curve_that_makes_drafts_dear_is_found_out(looks, monkeypatch):
    """Guards against a verdict that rules out the very rounds that would show it wrong; probes tell too little."""
    if not looks:
        monkeypatch.setattr(Handicap, "take_look", lambda *_: False)
    survival = [0.27, 0.01, 0.01, 0.01]  # by the curve too little for drafts to pay
    skipping, streams, costs = Skipping(GAMMA), pasts(4), Costs(IDLE)
    drafted = []
    for i in range(1400):
        plan = skipping.plan(streams, 100.0, costs)
        rows = [survival[: plan.slots] if drafts else [] for drafts in plan.drafting]
        lengths, count = [len(row[:1]) for row in rows], sum(plan.drafting)
        expected = costs.round_cost(4, 100.0, count, plan.slots)(4 + sum(lengths))
        skipping.learn(streams, rows, lengths, [0.27 * n for n in lengths], expected)
        took = expected * (0.85 if count and i >= 600 else 1.0)  # from then on they would pay
        skipping.handicap.see(Shape(4, 100.0, count, plan.slots, 4 + sum(lengths)), took, expected)
        drafted.append(count > 0)
    assert sum(drafted[300:600]) < 15
    assert sum(drafted[1000:]) > 350 if looks else sum(drafted[1000:]) < 50


def test_drafting_ends_where_its_rounds_take_longer_than_they_should():
    """Guards against a curve that flatters drafting a little, for as long as the service runs."""
    survival = [0.37, 0.1, 0.02, 0.01]  # pays by some 25 %, less than its rounds are to take longer
    for times, low, high, late in ((1.0, 0.9, 1.0, 1.0), (1.25, 0.0, 0.2, 0.05)):
        skipping, streams, costs = Skipping(GAMMA), pasts(1), Costs(IDLE)
        drafted = []
        for _ in range(2000):
            plan = skipping.plan(streams, 100.0, costs)
            row = survival[: plan.slots] if plan.drafting[0] else []
            skipping.learn(streams, [row], [len(row)], [sum(row)], 5.0)
            drafted.append(bool(row))
            skipping.handicap.see(round_of(1, bool(row)), 5.0 * (times if row else 1.0), 5.0)
        assert low <= sum(drafted) / 2000 <= high, times
        assert low <= sum(drafted[1000:]) / 1000 <= late, times  # once that is known


CURVED = Outlay(5.0, np.array([3.0, 4.0, 5.0]), np.array([5.0, 7.0, 12.0]), np.zeros((1, 1)))
"""Passes of three, four and five tokens."""


def in_the_mean(batch_tokens, variance, most):
    return mean_ms(*(np.array([x]) for x in (batch_tokens, variance, most)), CURVED).item()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_pass_of_one_slot_takes_what_its_two_sizes_do(share):
    """Guards against sizes that no round has: one slot is verified in a share of rounds, or not."""
    assert in_the_mean(3 + share, share * (1 - share), 4.0) == pytest.approx(5.0 + 2.0 * share)


def test_a_pass_takes_what_it_does_in_the_mean():
    """Guards against the cost of the mean size where costs bend."""
    assert in_the_mean(4.0, 0.0, 4.0) == in_the_mean(4.0, 0.0, 5.0) == pytest.approx(7.0)
    assert in_the_mean(4.0, 1.0, 5.0) == pytest.approx(8.5)  # three tokens or five, each in half of the rounds
    assert in_the_mean(3.5, 0.75, 5.0) == pytest.approx(6.75)  # three in three quarters, five in the others
    assert in_the_mean(3.0, 0.0, 5.0) == pytest.approx(5.0)


def test_the_variance_of_a_length_is_that_of_the_rounds_that_were_seen():
    skipping, (past,) = Skipping(GAMMA), pasts(1)
    lengths = [0, 4, 4, 1, 2, 2, 0, 3, 1] * 40
    for length in lengths:
        skipping.learn([past], [[0.9] * length + [0.001] * (GAMMA - length)], [length], [length], 5.0)
    _, verified, variance = skipping._expected([past])
    threshold = THRESHOLDS.tolist().index(0.52)
    weights = np.exp(-np.arange(len(lengths))[::-1] / STREAM_MEMORY)
    for slots in range(1, GAMMA + 1):
        cut = np.minimum(lengths, slots)
        mean = np.average(cut, weights=weights)
        assert verified[0, threshold, slots - 1] == pytest.approx(mean, abs=0.1)
        assert variance[0, threshold, slots - 1] == pytest.approx(
            np.average((cut - mean) ** 2, weights=weights), abs=0.1
        )
