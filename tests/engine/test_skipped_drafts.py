"""Streams that are not drafted for: what the drafter gets to see later, and that texts do not change."""

from __future__ import annotations

import time
from itertools import count, groupby
from math import inf
from types import SimpleNamespace

import pytest
import torch

from dspark_stream.decoding.schedule import Adaptive, Fixed, Lagged
from dspark_stream.engine import context as contexts
from dspark_stream.engine import step
from dspark_stream.engine.context import PASSES, Backlog, Context, Part, hand_over, room
from dspark_stream.engine.local import LocalEngine
from dspark_stream.load.costs import CapacityCurve
from dspark_stream.models.cache import Extent
from dspark_stream.types import TokensEvent
from tiny import FLAT, GAMMA, request, tiny_drafter, tiny_engine, tiny_rounds, tiny_target


def engine_with(schedule, *, head="vanilla", capacity=FLAT, gamma=GAMMA):
    target = tiny_target()
    drafter = tiny_drafter(target, head=head, gamma=gamma)
    return tiny_engine(tiny_rounds(target, drafter, schedule=schedule, capacity=capacity))


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

    looks_up = False

    def slots(self, gamma):
        self.round += 1
        return (
            gamma if self.round // 4 % self.n == 0 else 0
        )  # asked twice a round: two rounds with drafts, 2(n - 1) without

    def lengths(self, candidates, cost, price):
        return [min(1, len(c.survival)) for c in candidates]


@pytest.mark.parametrize("together", [0, 1 << 30])
@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_drafts_after_skipped_rounds_are_the_drafts_of_a_stream_that_never_skipped(n, head, together, monkeypatch):
    """Guards against context features that are lost, doubled or out of place while nobody drafts.

    Greedy text is the same, so a draft at a position must be the same too, whether or not rounds before it drafted.
    The longer gap fills the backlog in between, where it has no more than its own room.
    """
    asked = [
        request(str(i), (5, 6, 7 + i) * (1 + 12 * i), max_tokens=64, ignore_eos=True, record_rounds=True)
        for i in range(3)
    ]
    monkeypatch.setattr(contexts, "ROOM", 16)
    monkeypatch.setattr(contexts, "TOGETHER", 0)  # prompts are handed over at once where they are longer than ROOM
    always = rounds_of(engine_with(Fixed(GAMMA), head=head), asked)
    monkeypatch.setattr(contexts, "TOGETHER", together)
    skipping = rounds_of(engine_with(EveryNth(n), head=head), asked)
    compared = 0
    for name, rounds in skipping.items():
        by_start = {r.start: r.draft_tokens for r in always[name]}
        for one in rounds:
            if one.draft_tokens and one.start in by_start:
                assert one.draft_tokens == by_start[one.start]
                compared += 1
    assert compared >= 3


@pytest.mark.parametrize(
    ("part", "name", "at"),
    [
        *(("target", "forward", at) for at in (3, 9, 20, 40)),
        *(("drafter", "append_context", at) for at in (1, 2, 3)),
        *(("", "settle", at) for at in (3, 9, 20, 40)),
    ],
)
def test_a_fault_while_nobody_drafts_costs_no_features(part, name, at, monkeypatch):
    """Guards against features of passes before the fault that are lost with it, and against those that come twice."""
    asked = [request(str(i), (5, 6, 7 + i), max_tokens=64, ignore_eos=True, record_rounds=True) for i in range(3)]
    always = rounds_of(engine_with(Fixed(GAMMA)), asked)
    monkeypatch.setattr(contexts, "ROOM", 16)
    monkeypatch.setattr(contexts, "TOGETHER", 0)
    engine = engine_with(EveryNth(12))
    model, calls = getattr(engine._models, part) if part else step, count()
    real = getattr(model, name)

    def once(*args, **kwargs):
        if next(calls) == at:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(model, name, once)
    skipping = rounds_of(engine, asked)
    assert next(calls) > at + 1
    compared = 0
    for stream, rounds in skipping.items():
        by_start = {r.start: r.draft_tokens for r in always[stream]}
        drafted = [r for r in rounds if r.draft_tokens and r.start in by_start]
        assert [r.draft_tokens for r in drafted] == [by_start[r.start] for r in drafted]
        compared += len(drafted)
    assert compared >= 3


def test_passes_over_anchors_are_told_apart_when_somebody_asks():
    """Guards against rows that go to another stream, come twice, or stay behind where a stream leaves."""
    drafter = Recorder()
    context = Context(drafter, object())
    streams = [
        SimpleNamespace(extent=Extent(1000 * i, 900), position=10 * i, backlog=Backlog(), max_chunk_gap_ms=inf)
        for i in range(3)
    ]
    wanted, row = [[] for _ in streams], iter(range(10**6))
    for number in range(3 * PASSES):
        some = streams if number < PASSES + 3 else streams[1:]
        if number % 5 == 4:  # one with a draft token that stands for the last of them
            at = next(row), next(row)
            context.keep(torch.tensor(at).float().view(-1, 1), [Part(some[-1], 0, 2, some[-1].position, False)], some)
            wanted[2] += zip(range(some[-1].position, some[-1].position + 2), at, strict=True)
            some[-1].position += 2
            continue
        rows = [next(row) for _ in some]
        context.keep_anchors(torch.tensor(rows).float().view(-1, 1), some)
        for stream, at in zip(some, rows, strict=True):
            wanted[streams.index(stream)].append((stream.position, at))
            stream.position += 1
    assert context.owed(streams) == [len(one) for one in wanted]
    context.deliver(streams)
    assert drafter.given == [(1000 * i + p, p, float(at)) for i, one in enumerate(wanted) for p, at in one]
    assert context.owed(streams) == [0, 0, 0]


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

    looks_up = False

    def slots(self, gamma):
        return self._slots

    def lengths(self, candidates, cost, price):
        return [0] * len(candidates)


def test_what_late_features_take_is_not_taken_for_slow_drafting():
    """Guards against looks that nothing is learnt from, and against learning their catching up."""
    seen = []
    slow_ms = 40.0

    class Slow(type(tiny_drafter(tiny_target()))):
        def append_context(self, taps, positions, slots, store):
            time.sleep(1e-3 * slow_ms * (len(taps) > 2 * (1 + GAMMA)))
            super().append_context(taps, positions, slots, store)

    engine = engine_with(EveryNth(12))
    engine._models.drafter.__class__ = Slow
    engine._models.controller.costs.learn = lambda shape, ms: seen.append((shape.drafting > 0, ms))
    asked = request("a", (5, 6, 7), max_tokens=100, ignore_eos=True, record_rounds=True)
    (rounds,) = rounds_of(engine, [asked]).values()
    drafted = [ms for is_drafted, ms in seen if is_drafted]
    assert len(drafted) == sum(bool(r.draft_tokens) for r in rounds) >= 4
    assert max(drafted) < slow_ms  # some of these began with 22 rounds' features
    assert max(r.t_draft_ms for r in rounds) > slow_ms


def test_nothing_is_kept_of_streams_that_are_gone():
    """Guards against an idle service that holds the last streams' features."""
    engine = engine_with(Fixed(0))
    with LocalEngine(engine) as local:
        assert list(local.run([request("a", (5, 6, 7), max_tokens=5, ignore_eos=True)], 1))
        context, until = engine._rounds.context, time.monotonic() + 10
        while context._anchors and time.monotonic() < until:
            time.sleep(1e-3)
        assert not context._anchors


def test_plain_streams_hold_nothing_of_those_before_them():
    """Guards against features of streams that are gone, held for as long as others decode in plain mode."""
    context = Context(Recorder(), object())
    stream = SimpleNamespace(extent=Extent(0, 400), position=0, backlog=Backlog(), max_chunk_gap_ms=inf)
    context.keep_anchors(torch.zeros(1, 1), [stream])
    context.keep(torch.zeros(1, 1), [], [])
    assert not context._anchors


def test_the_first_round_after_a_rest_is_compared_with_none():
    """Guards against a machine that changed while nobody asked, taken for what drafting costs."""
    engine, seen = engine_with(Adaptive()), []
    costs = engine._models.controller.costs
    learn, rest = costs.learn, costs.rest
    costs.learn = lambda *round_: (seen.append("round"), learn(*round_))
    costs.rest = lambda: (seen.append("rest"), rest())
    with LocalEngine(engine) as local:
        for name in "ab":
            assert list(local.run([request(name, (5, 6, 7), max_tokens=20, ignore_eos=True)], 1))
    assert [kind for kind, _ in groupby(seen)][:4] == ["rest", "round"] * 2
    assert seen.count("round") > 6


STEEP = CapacityCurve(tokens=[1, 64], verify_ms=[1.0, 64.0], streams=[1, 16], draft_ms=[5.0, 80.0], gamma=GAMMA)


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


def test_what_waits_is_bounded_however_many_streams_there_are(monkeypatch):
    """Guards against rows of many streams that come in faster than they are handed over."""
    monkeypatch.setattr(contexts, "TOGETHER", 0)
    drafter, rounds = Recorder(), 300
    context = Context(drafter, object())
    streams = [
        SimpleNamespace(extent=Extent(400 * i, 400), position=0, backlog=Backlog(), max_chunk_gap_ms=inf)
        for i in range(200)
    ]
    for _ in range(rounds):
        context.keep_anchors(torch.zeros(len(streams), 1), streams, contexts.HANDED_A_ROUND)
        for stream in streams:
            stream.position += 1
    assert sum(context.owed(streams)) < len(streams) * (contexts.ROOM + 20)


def test_where_there_are_few_streams_each_keeps_more():
    taps = torch.zeros(3, 1024)  # 4 KiB a position
    assert room(1, taps) * 4096 <= 1 << 28  # bytes
    assert room(1, taps) == 8 * room(8, taps) > 1000
    assert room(10**6, taps) == room(10**7, taps) > 16  # never less


class Recorder:
    """A drafter that keeps what it is given."""

    gamma, context_window = GAMMA, 0

    def __init__(self, ring=0):
        self.given, self.most, self.calls, self.ring = [], 0, 0, ring

    def append_context(self, taps, positions, slots, store):
        assert len(taps) == len(positions) == len(slots)
        self.most, self.calls = max(self.most, len(taps)), self.calls + 1
        self.given += zip(slots, positions, taps[:, 0].tolist(), strict=True)


def test_long_contexts_are_handed_over_in_pieces_that_lack_nothing():
    sizes, owed = (1203, 1, 0, 70), []
    for i, size in enumerate(sizes):
        backlog = Backlog()
        for at in range(0, size, 100):  # a prompt's chunks, say
            some = min(100, size - at)
            backlog.add(torch.arange(5000.0 * i + at, 5000.0 * i + at + some).view(-1, 1), 0, some, 5 + at)
        if size:
            owed.append((Extent(5000 * i, 4000), backlog))
    drafter = Recorder()
    hand_over(owed, drafter, None, 70)
    assert len(drafter.given) == 70
    hand_over(owed, drafter, None)
    wanted = [(5000 * i + 5 + n, 5 + n, 5000.0 * i + n) for i, size in enumerate(sizes) for n in range(size)]
    assert drafter.given == wanted
    assert drafter.most <= 512  # of more, what one step writes is out of the caches before the next reads it
    assert drafter.calls <= 2 + 2 * sum(sizes) / drafter.most  # and no more products than that takes
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
