"""Bounds on the gap between chunks: who takes part in a round, how long it may take, and that nobody starves."""

from __future__ import annotations

from collections import Counter
from math import inf
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from dspark_stream.decoding.schedule import Adaptive
from dspark_stream.engine.local import LocalEngine
from dspark_stream.engine.pacing import pace
from dspark_stream.errors import InvalidRequestError
from dspark_stream.load.costs import CapacityCurve
from dspark_stream.types import TokensEvent
from tiny import GAMMA, request, tiny_drafter, tiny_engine, tiny_rounds, tiny_target

CURVE = CapacityCurve(tokens=[1, 64], verify_ms=[10.0, 640.0], streams=[1, 16], draft_ms=[0.1, 0.2], gamma=GAMMA)
"""Ten milliseconds a token."""


def stream(gap=inf, last=0.0):
    return SimpleNamespace(max_chunk_gap_ms=gap, last_chunk_s=last)


def test_without_a_bound_everybody_takes_part_and_takes_the_time_it_takes():
    streams = [stream() for _ in range(9)]
    assert pace(streams, lambda n: 1e6, 5.0) == (streams, inf)


def test_a_bound_leaves_what_is_left_of_it():
    streams = [stream(), stream(100.0, last=0.98), stream(500.0, last=0.5)]
    together, slowest_ms = pace(streams, lambda n: 10.0 * n, 1.0)
    assert together == streams
    assert slowest_ms == pytest.approx(0.0)  # the third is due now


def test_streams_without_a_bound_take_turns_and_none_starves():
    """Six streams take 60 ms, the bound allows 40: the bounded one is always in, the others by how long they waited."""
    streams = [stream(40.0), *[stream() for _ in range(5)]]
    turns: Counter[int] = Counter()
    for step in range(100):
        now_s = 0.03 * step
        together, _ = pace(streams, lambda n: 10.0 * n, now_s)
        assert together[0] is streams[0]
        assert 10.0 * len(together) <= 40.0
        for k, one in enumerate(together):
            one.last_chunk_s = now_s + 1e-5 * k  # committed one after the other
            turns[next(r for r, s in enumerate(streams) if s is one)] += 1
    assert turns[0] == 100
    assert max(turns[r] for r in range(1, 6)) - min(turns[r] for r in range(1, 6)) <= 1


def test_a_bound_that_cannot_be_kept_starves_nobody():
    streams = [*[stream(5.0) for _ in range(4)], stream()]
    assert pace(streams, lambda n: 10.0 * n, 1.0).streams == streams  # one without a bound is always in
    bounded = streams[:4]
    assert pace(bounded, lambda n: 10.0 * n, 1.0).streams == bounded


def run(requests, **options):
    target = tiny_target()
    rounds = tiny_rounds(target, tiny_drafter(target), schedule=Adaptive(), capacity=CURVE)
    found = {r.request_id: [] for r in requests}
    engine = tiny_engine(rounds, **options)
    with LocalEngine(engine) as local:
        for event, _ in local.run(requests, len(requests)):
            if isinstance(event, TokensEvent) and event.round:
                found[event.request_id].append(event.round)
    return found, engine


def ask(name, **options):
    return request(name, (5, 6, ord(name) % 40), max_tokens=30, ignore_eos=True, record_rounds=True, **options)


def test_the_engine_keeps_rounds_within_a_streams_bound():
    """Guards against a bound that is parsed and forgotten: by the curve, rounds of at most 3 tokens fit 36 ms."""
    free, _ = run([ask(name) for name in "abcdef"])
    assert max(r.streams for rounds in free.values() for r in rounds) == 6
    found, engine = run([ask("a", max_chunk_gap_ms=40.0), *[ask(name) for name in "bcdef"]])
    first = found["a"]
    assert max(r.batch_tokens for r in first[1:]) <= 3
    assert all(sum(r.accepted + 1 for r in rounds) >= 29 for rounds in found.values())  # everybody came to the end
    assert engine.snapshot().late_chunks_total <= len(first)


def test_the_services_bound_is_everybodys_and_a_bad_one_is_refused():
    found, _ = run([ask("a")], max_chunk_gap_ms=15.0)
    assert max(r.batch_tokens for r in found["a"]) == 1  # 20 ms would be too long
    with pytest.raises(InvalidRequestError, match="max_chunk_gap_ms must be a number"):
        run([ask("a", max_chunk_gap_ms=-1.0)])


def test_prompt_chunks_shrink_for_a_bound():
    _, engine = run([ask("a")])
    free = [SimpleNamespace(max_chunk_gap_ms=inf, position=10, acceptance="greedy")] * 2
    bound = [SimpleNamespace(max_chunk_gap_ms=300.0, position=10, acceptance="greedy"), free[0]]
    assert engine._chunk(free) == 16  # of what was measured, nothing but one token is within 60 ms
    engine._prefill_budget_ms = 1e4
    assert engine._chunk(free) == 64
    assert engine._chunk(bound) == 16


def test_prompt_chunks_shrink_with_how_far_a_prompt_has_been_read():
    """Guards against a pass at position 6,000 that takes many times what it would at the beginning."""
    curve = replace(CURVE, tokens=[1, 16, 64], verify_ms=[1.0, 10.0, 40.0], attend_us=1.0)
    engine = tiny_engine(tiny_rounds(capacity=curve))
    assert [engine._chunk([], position) for position in (0, 3000, 4000, 9000, 10**6)] == [64, 64, 16, 16, 16]
