"""Streams that are not drafted for: what the drafter gets to see later, and that texts do not change."""

from __future__ import annotations

import time

import msgspec
import pytest
import torch

from dspark_stream.engine import backlog as backlogs
from dspark_stream.engine.backlog import PIECE, ROOM, TOGETHER, Backlog, hand_over, room
from dspark_stream.engine.drift import WINDOW, Drift, watch
from dspark_stream.local import LocalEngine
from dspark_stream.models.cache import Extent
from dspark_stream.spec.capacity import CapacityCurve, Costs
from dspark_stream.spec.handicap import Handicap, Shape
from dspark_stream.load.schedule import Adaptive, Fixed, Lagged
from dspark_stream.types import TokensEvent
from tiny import FLAT, GAMMA, request, tiny_drafter, tiny_engine, tiny_models, tiny_target


def engine_with(schedule, *, head="vanilla", capacity=FLAT, gamma=GAMMA):
    target = tiny_target()
    drafter = tiny_drafter(target, head=head, gamma=gamma)
    return tiny_engine(tiny_models(target, drafter, schedule=schedule, capacity=capacity))


def rounds_of(engine, requests):
    found = {r.request_id: [] for r in requests}
    with LocalEngine(engine) as local:
        for event, _ in local.run(requests, len(requests)):
            if isinstance(event, TokensEvent) and event.round:
                found[event.request_id].append(event.round)
    return found


class EveryNth:
    """Drafts whole blocks in one round of ``n`` and verifies one token; drafts nothing in the others."""

    def __init__(self, n):
        self.n, self.round, self.drafts = n, 0, 0

    def slots(self, gamma):
        self.round += 1
        return (
            gamma if self.round // 4 % self.n == 0 else 0
        )  # asked twice a round: two rounds with drafts, 2(n - 1) without

    def lengths(self, candidates, cost, price):
        return [min(1, len(c.survival)) for c in candidates]


@pytest.mark.parametrize("together", [0, TOGETHER])
@pytest.mark.parametrize("n", [3, 3 * ROOM // 4])
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_drafts_after_skipped_rounds_are_the_drafts_of_a_stream_that_never_skipped(n, head, together, monkeypatch):
    """Guards against context features that are lost, doubled or out of place while nobody drafts.

    Greedy text is the same, so a draft at a position must be the same too, whether or not rounds before it drafted.
    The longer gap fills the backlog in between, where it has no more than its own room.
    """
    asked = [
        request(str(i), (5, 6, 7 + i) * (1 + 12 * i), max_tokens=2 * ROOM, ignore_eos=True, record_rounds=True)
        for i in range(3)
    ]
    monkeypatch.setattr(backlogs, "TOGETHER", 0)  # prompts are handed over at once where they are longer than ROOM
    always = rounds_of(engine_with(Fixed(GAMMA), head=head), asked)
    monkeypatch.setattr(backlogs, "TOGETHER", together)
    skipping = rounds_of(engine_with(EveryNth(n), head=head), asked)
    compared = 0
    for name, rounds in skipping.items():
        by_start = {r.start: r.draft_tokens for r in always[name]}
        for one in rounds:
            if one.draft_tokens and one.start in by_start:
                assert one.draft_tokens == by_start[one.start]
                compared += 1
    assert compared >= 3


@pytest.mark.parametrize("slots", range(1, GAMMA + 1))
@pytest.mark.parametrize(("temperature", "verification"), [(0.0, "rejection"), (0.8, "rejection"), (0.8, "coupled")])
def test_fewer_slots_are_the_block_of_a_drafter_that_has_no_more(slots, temperature, verification):
    """Guards against slots that are left out and still looked at, other confidences and other uniforms."""
    asked = request(
        "a", (5, 6, 7), temperature=temperature, verification=verification, record_rounds=True, ignore_eos=True, seed=3
    )
    (short,) = rounds_of(engine_with(EveryRound(slots), gamma=slots), [asked]).values()
    (part,) = rounds_of(engine_with(EveryRound(slots)), [asked]).values()
    assert len(short) == len(part) == 23
    for one, other in zip(short, part, strict=True):
        assert len(one.draft_tokens) == slots
        assert other.draft_tokens == one.draft_tokens
        assert other.confidence == pytest.approx(one.confidence)
        assert other.bonus == one.bonus


class EveryRound(EveryNth):
    """Drafts so many tokens in every round and verifies none."""

    def __init__(self, slots):
        self._slots = slots

    def slots(self, gamma):
        return self._slots

    def lengths(self, candidates, cost, price):
        return [0] * len(candidates)


def test_what_late_features_take_is_not_taken_for_slow_drafting(monkeypatch):
    """Guards against probes that nothing is learnt from, and against learning their catching up."""
    seen = []
    monkeypatch.setattr(Handicap, "see", lambda self, shape, ms, expected_ms: seen.append((shape.drafting > 0, ms)))
    slow_ms = 40.0

    class Slow(type(tiny_drafter(tiny_target()))):
        def append_context(self, taps, positions, slots, store):
            time.sleep(1e-3 * slow_ms * (len(taps) > 2 * (1 + GAMMA)))
            super().append_context(taps, positions, slots, store)

    engine = engine_with(EveryNth(12))
    engine._models.drafter.__class__ = Slow
    asked = request("a", (5, 6, 7), max_tokens=100, ignore_eos=True, record_rounds=True)
    (rounds,) = rounds_of(engine, [asked]).values()
    drafted = [ms for is_drafted, ms in seen if is_drafted]
    assert len(drafted) == sum(bool(r.draft_tokens) for r in rounds) >= 4
    assert max(drafted) < slow_ms  # some of these began with 22 rounds' features
    assert max(r.t_draft_ms for r in rounds) > slow_ms


STEEP = CapacityCurve(
    tokens=[1, 64], verify_ms=[1.0, 64.0], streams=[1, 16], stream_ms=[0.0, 0.1], draft_ms=[5.0, 80.0], gamma=GAMMA
)


@pytest.mark.parametrize("schedule", [Adaptive(), Lagged()])
def test_on_a_machine_where_drafting_never_pays_it_stops(schedule):
    """Guards against the tax on a busy machine: after the first guesses nearly every round is a plain one."""
    asked = [request(str(i), (5, 6, i), max_tokens=200, ignore_eos=True, record_rounds=True) for i in range(4)]
    rounds = rounds_of(engine_with(schedule, capacity=STEEP), asked)
    for one in rounds.values():
        assert sum(bool(r.draft_tokens) for r in one[20:]) <= 0.05 * len(one)


def test_backlog_keeps_order_and_room():
    backlog = Backlog()
    taps = torch.arange(20.0).view(10, 2)
    backlog.add(taps, 3, 2, 7)
    backlog.add(taps, 0, 1, 9)
    assert (backlog.first, backlog.count) == (7, 3)
    assert torch.equal(torch.cat(backlog.take(1)), taps[[3]])
    assert (backlog.first, backlog.count) == (8, 2)
    assert torch.equal(torch.cat(backlog.take(9)), taps[[4, 0]])
    assert (backlog.count, backlog.take(1)) == (0, [])
    backlog.add(taps, 0, 1, 40)
    assert backlog.first == 40


def test_where_there_are_few_streams_each_keeps_more():
    taps = torch.zeros(3, 1024)  # 4 KiB a position
    assert room(1, taps) == TOGETHER // 4096
    assert room(8, taps) == TOGETHER // 4096 // 8
    assert room(10**6, taps) == ROOM


class Recorder:
    """A drafter that keeps what it is given."""

    def __init__(self, ring=0):
        self.given, self.most, self.ring = [], 0, ring

    def append_context(self, taps, positions, slots, store):
        assert len(taps) == len(positions) == len(slots)
        self.most = max(self.most, len(taps))
        self.given += zip(slots, positions, taps[:, 0].tolist(), strict=True)


def test_long_backlogs_are_handed_over_in_pieces_that_lack_nothing():
    sizes, owed = (2 * PIECE + 3, 1, 0, 70), []
    for i, size in enumerate(sizes):
        backlog = Backlog()
        for at in range(0, size, 100):  # a prompt's chunks, say
            some = min(100, size - at)
            backlog.add(torch.arange(1000.0 * i + at, 1000.0 * i + at + some).view(-1, 1), 0, some, 5 + at)
        if size:
            owed.append((Extent(1000 * i, 900), backlog))
    drafter = Recorder()
    hand_over(owed, drafter, None, 70)
    assert len(drafter.given) == 70
    hand_over(owed, drafter, None)
    wanted = [(1000 * i + 5 + n, 5 + n, 1000.0 * i + n) for i, size in enumerate(sizes) for n in range(size)]
    assert drafter.given == wanted
    assert drafter.most <= PIECE
    assert not any(backlog.count for _, backlog in owed)


def test_a_drafter_with_a_ring_is_given_what_its_window_holds():
    """Of a prompt only the latest positions are kept, and they go round in the stream's own part of its store."""
    backlog, drafter = Backlog(), Recorder(ring=64)
    for at in range(0, 330, 100):
        backlog.add(torch.arange(at, min(at + 100, 330)).float().view(-1, 1), 0, min(100, 330 - at), at, window=40)
        assert backlog.count <= 40
    assert (backlog.first, backlog.count) == (290, 40)
    hand_over([(Extent(1000, 400, 192), backlog)], drafter, None)
    assert drafter.given == [(192 + p % 64, p, float(p)) for p in range(290, 330)]


CURVE = CapacityCurve(
    tokens=[1, 4, 16], verify_ms=[5.0, 8.0, 20.0], streams=[1, 8], stream_ms=[0.0] * 2, draft_ms=[2.0, 4.0],
    slot_ms=[0.2, 0.4], rest_ms=[1.0, 1.5],
)  # fmt: skip


def takes(drift, tokens, pass_ms, draft_ms=None, drafting=1):
    """A round that takes so long, as `Drift` is told of it; whether its curve changed."""
    i, j = CURVE.tokens.index(tokens), CURVE.streams.index(drafting)
    draft = None if draft_ms is None else draft_ms / drift.curve.draft_ms[j]
    return drift.see(tokens, pass_ms / drift.curve.verify_ms[i], drafting if draft_ms else 0, draft)


def test_drift_follows_a_machine_that_changes_and_not_a_slow_round(caplog):
    """Guards against schedules that go by a machine that is gone, and against following every hiccup."""
    drift = Drift(CURVE)
    for slow_pass, slow_draft in ((1.0, 10.0), (10.0, 1.0)):
        for i in range(4 * WINDOW):
            assert not takes(drift, 1, 5.0 * (slow_pass if i % 3 == 0 else 1), 2.0 * (slow_draft if i % 3 == 0 else 1))
    assert drift.curve == CURVE
    for _ in range(8 * WINDOW):  # a neighbour: everything takes twice as long, drafting three times
        takes(drift, 1, 10.0, 6.0)
    assert drift.curve.verify_ms == pytest.approx([10.0, 16.0, 40.0], rel=0.01)  # sizes that were not seen go along
    assert drift.curve.draft_ms == pytest.approx([6.0, 12.0], rel=0.04)
    assert drift.curve.rest_ms == pytest.approx([2.0, 3.0], rel=0.01)
    assert drift.ratio == pytest.approx(2.0, rel=0.01)
    assert "2.00 times" in caplog.text


def test_drift_learns_how_far_sizes_are_apart_from_neighbours():
    """Guards against a shape that is learnt from nothing, or forgotten while one size runs alone."""
    drift = Drift(CURVE)
    for turn in range(40):  # four rows take a quarter longer beside one than was measured
        for _ in range(20):
            takes(drift, 4 if turn % 2 else 1, 10.0 if turn % 2 else 5.0)
    apart = drift.curve.verify_ms[1] / drift.curve.verify_ms[0]
    assert apart == pytest.approx(2.0, rel=0.03)
    assert drift.curve.verify_ms[2] / drift.curve.verify_ms[1] == pytest.approx(2.5, rel=0.03)  # goes with the nearest
    for i in range(400):  # then one of them runs alone, and soon slow: that is the machine
        takes(drift, 1, 5.0 if i < 10 else 7.0)
    assert drift.curve.verify_ms[1] / drift.curve.verify_ms[0] == pytest.approx(apart, rel=0.02)


def test_what_a_newcomer_shows_leaves_what_is_known_alone():
    """Guards against sizes that are known well giving way to one that is seen for the first time, and against a pace
    that is one size's own."""
    drift = Drift(CURVE)
    for turn in range(60):
        for _ in range(10):
            takes(drift, 4 if turn % 2 else 1, 8.0 if turn % 2 else 5.0)
    for turn in range(20):  # sixteen rows take a third more than was measured
        for _ in range(12):
            takes(drift, 16 if turn % 2 else 1, 27.0 if turn % 2 else 5.0)
        assert drift.curve.verify_ms[1] / drift.curve.verify_ms[0] == pytest.approx(1.6, rel=0.04)
    assert drift.curve.verify_ms[2] / drift.curve.verify_ms[0] == pytest.approx(5.4, rel=0.04)
    assert drift.ratio == pytest.approx(1.0, abs=0.03)
    assert drift.curve.rest_ms == pytest.approx(CURVE.rest_ms, rel=0.03)


def test_costs_come_to_say_what_rounds_take(caplog):
    """Rounds of a machine that is another one than was measured, and swings: the curve and the handicap beside it come
    to say together how much longer a round with drafts takes than a plain one."""
    curve = msgspec.structs.replace(CURVE, gamma=3)
    true = Costs(msgspec.structs.replace(curve, verify_ms=[5.0, 10.0, 25.0], draft_ms=[2.6, 5.2], rest_ms=[1.2, 1.8]))
    drift, handicap, costs = Drift(curve), Handicap(), Costs(curve)
    for i in range(4000):
        drafting = int(i % 60 >= 8)
        now, takes_now = (c.round_cost(1, 0.0, drafting, 3 * drafting) for c in (costs, true))
        shape = Shape(1, 0.0, drafting, 3 * drafting, 1 + 3 * drafting)
        pace = 1.4 if i // 150 % 2 else 1.0
        round_ms = pace * takes_now(shape.batch_tokens)
        pass_ms = round_ms - pace * (takes_now.draft_ms + takes_now.rest_ms)
        costs = watch(drift, handicap, costs, shape, now, round_ms=round_ms, verify_ms=pass_ms)
        if i > 1000 and i % 100 == 0:
            believed, is_so = (c.round_cost(1, 0.0, 1, 3)(4) / c.round_cost(1, 0.0, 0, 0)(1) for c in (costs, true))
            assert believed * handicap.factor(1) == pytest.approx(is_so, rel=0.05)


def test_a_machine_that_swings_changes_nothing_between_sizes():
    """Guards against a size seen in a slow second, and another in a fast one, held against each other."""
    drift, rounds = Drift(CURVE), 0
    for turn in range(120):  # plain rounds, then drafts, in blocks that know nothing of the swings
        for _ in range(37):
            rounds += 1
            pace = 1.5 if rounds // 200 % 2 else 1.0
            takes(drift, 4 if turn % 2 else 1, pace * (8.0 if turn % 2 else 5.0), pace * 2.0 if turn % 2 else None)
        now = drift.curve
        assert now.verify_ms[1] / now.verify_ms[0] == pytest.approx(1.6, rel=0.06)
        assert now.draft_ms[0] / now.verify_ms[0] == pytest.approx(0.4, rel=0.06)


def test_drafting_for_many_tells_nothing_of_drafting_for_one_once_that_was_seen():
    """Guards against one load's drafting setting the price of another's."""
    drift = Drift(CURVE)
    for _ in range(8 * WINDOW):  # for one: half as long again
        takes(drift, 1, 5.0, 3.0)
    assert drift.curve.draft_ms == pytest.approx([3.0, 6.0], rel=0.04)
    for _ in range(8 * WINDOW):  # for many: as measured
        takes(drift, 16, 20.0, 4.0, drafting=8)
    assert drift.curve.draft_ms == pytest.approx([3.0, 4.0], rel=0.04)
    assert drift.curve.slot_ms == pytest.approx([0.3, 0.4], rel=0.04)
    assert drift.curve.verify_ms == CURVE.verify_ms
