"""Who is next in the engine, and how the prompt tokens of a pass are shared."""

from __future__ import annotations

import random
from collections import Counter

from msgspec.structs import replace

from dspark_stream.engine.sharing import in_turn, shares
from dspark_stream.engine.stream import Phase, Stream
from tiny import request


def stream(name: str, tokens: int, client: str = "", phase: Phase = Phase.PREFILL) -> Stream:
    made = Stream(replace(request(name, (5,) * tokens), client=client), 48, 0, frozenset(), None)
    made.phase = phase
    return made


def given(joining: list[Stream], budget: int) -> dict[str, int]:
    return {s.request.request_id: count for s, count in shares(joining, budget)}


def test_half_for_the_shortest_and_half_for_the_oldest():
    joining = [stream("old", 6000), stream("next", 6000), stream("short", 5), stream("middle", 300)]
    assert given(joining, 64) == {"short": 5, "middle": 27, "old": 32}
    assert given(joining[:2], 64) == {"old": 64}
    assert given(joining, 10_000_000) == {"old": 6000, "next": 6000, "short": 5, "middle": 300}
    assert given([stream("only", 7)], 64) == {"only": 7}
    assert given([], 64) == {}


def test_what_is_left_of_a_prompt_counts():
    joining = [stream("a", 100), stream("b", 200)]
    joining[1].prefilled = 190
    assert given(joining, 32) == {"b": 10, "a": 22}


def test_a_client_with_many_prompts_makes_itself_wait():
    """Guards against a crowd of short prompts of one client before another's one, and of long ones likewise."""
    crowd = [stream(f"a{i}", 20, "a") for i in range(30)]
    assert given([*crowd, stream("b", 30, "b")], 100)["b"] == 30
    pages = [stream(f"a{i}", 5000, "a") for i in range(30)]
    both = [*pages, stream("b", 5000, "b")]
    both[0].prefilled = 4990
    assert given(both, 100) == {"a0": 10, "b": 90}


def test_nobody_starves():
    """Guards against a long prompt that is never read while short ones keep coming."""
    long = stream("long", 1000)
    joining, passes = [long], 0
    while long.prefilled < 1000:
        joining += [stream(f"s{passes}-{i}", 16, client=str(i)) for i in range(8)]
        for one, count in shares(joining, 64):
            one.prefilled += count
        joining = [s for s in joining if s.prefilled < len(s.request.prompt_ids)]
        passes += 1
    assert passes <= 1000 // 32 + 1


def test_a_pass_is_full_and_nobody_gets_more_than_is_left():
    rng = random.Random(3)
    for _ in range(300):
        joining = [stream(str(i), rng.randint(1, 60), rng.choice("abc")) for i in range(rng.randint(1, 9))]
        for one in joining:
            one.prefilled = rng.randrange(len(one.request.prompt_ids))
        rest = {s.request.request_id: len(s.request.prompt_ids) - s.prefilled for s in joining}
        budget = rng.randint(1, 120)
        counts = given(joining, budget)
        assert sum(counts.values()) == min(budget, sum(rest.values()))
        assert all(0 < count <= rest[name] for name, count in counts.items())


def test_the_next_place_is_for_the_client_with_the_fewest():
    waiting = [stream(f"{c}{i}", 4, c, Phase.WAITING) for c, n in (("a", 4), ("b", 2), ("c", 1)) for i in range(n)]
    running = [stream("x", 4, "a", Phase.DECODE), stream("y", 4, "b", Phase.PREFILL)]
    order = [s.request.request_id for s in in_turn([*running, *waiting], 20)]
    assert order == ["c0", "a0", "b0", "a1", "b1", "a2", "a3"]
    assert not list(in_turn(running, 20))
    assert [s.request.request_id for s in in_turn([*running, *waiting], 3)] == ["c0"]


def test_the_last_places_are_for_clients_that_have_none():
    """Guards against long answers of one client that keep out whoever comes until the first of them ends."""
    running = [stream(f"r{i}", 4, "hog", Phase.DECODE) for i in range(13)]
    waiting = [stream(f"w{i}", 4, "hog", Phase.WAITING) for i in range(5)]
    assert [s.request.request_id for s in in_turn([*running, *waiting], 16)] == ["w0"]
    other = [stream("o0", 4, "other", Phase.WAITING), stream("o1", 4, "other", Phase.WAITING)]
    assert [s.request.request_id for s in in_turn([*running, *waiting, *other], 16)] == ["o0"]
    nobodys = [stream(f"n{i}", 4, "", Phase.WAITING) for i in range(5)]
    assert len(list(in_turn([*running, *nobodys], 16))) == 3


def test_whoever_has_places_still_gets_his_turn():
    """Guards against a client that waits for ever because others are always better off with fewer."""
    rng = random.Random(1)
    streams = [stream(f"hog{i}", 4, "hog", Phase.WAITING) for i in range(40)]
    served: Counter[str] = Counter()
    for turn in range(400):
        streams.append(stream(f"n{turn}", 4, f"c{turn % 7}", Phase.WAITING))
        running = [s for s in streams if s.phase is Phase.DECODE]
        for following in in_turn(streams, 4):
            following.phase = Phase.DECODE
            served[following.request.client] += 1
        running = [s for s in streams if s.phase is Phase.DECODE]
        streams.remove(rng.choice(running))
    assert served["hog"] == 40
    assert sum(served.values()) >= 400
