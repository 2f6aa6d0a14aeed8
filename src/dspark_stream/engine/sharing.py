"""Who is next: for a place in the batch, and for the prompt tokens of a pass. Fair between clients, and to the long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from dspark_stream.engine.stream import Phase, Stream

KEPT_FREE = 8
"""Of so many places in the batch one is for clients that have none: long answers of one must not keep all others out.
More of them would leave more of a batch empty while one client is alone."""


def in_turn(streams: Sequence[Stream], most: int) -> Iterator[Stream]:
    """The waiting ones of ``streams``, oldest first, in the order in which they get the free ones of ``most`` places.

    The next place is for the client that has the fewest; among equals for the stream that came first. The last places
    are for clients that have none; streams of no client in particular may have them all. It counts on the places being
    taken as they are handed out, and nobody overtakes a stream that does not fit yet: stop there.
    """
    waiting = [s for s in streams if s.phase is Phase.WAITING]
    places = Counter(s.request.client for s in streams if s.phase is not Phase.WAITING) if waiting else Counter[str]()
    free = most - places.total()
    while waiting and free > 0:
        following = min(waiting, key=lambda s: places[s.request.client])
        client = following.request.client
        if client and places[client] and free <= most // KEPT_FREE:
            return
        yield following
        waiting.remove(following)
        places[client] += 1
        free -= 1


def shares(joining: Sequence[Stream], budget: int) -> list[tuple[Stream, int]]:
    """How many tokens of whose prompt one pass reads, ``budget`` in all; ``joining`` are oldest first.

    Half goes to the prompts that are through soonest, so that a short one does not wait for long ones, and half to
    those that came first, so that a long one goes on whatever arrives behind it. In either order a client's own prompts
    stand one behind the other: who sends many makes himself wait.
    """
    given = dict.fromkeys(range(len(joining)), 0)
    left = budget
    for order, most in ((_soonest(joining), budget // 2), (_oldest(joining), budget)):
        reserve = budget - most
        for i in order:
            count = min(_rest(joining[i]) - given[i], left - reserve)
            given[i] += count
            left -= count
    return [(stream, given[i]) for i, stream in enumerate(joining) if given[i]]


def _rest(stream: Stream) -> int:
    return len(stream.request.prompt_ids) - stream.prefilled


def _soonest(joining: Sequence[Stream]) -> list[int]:
    """By what there is to read until a prompt is through, the shorter ones of the same client included."""
    before: Counter[str] = Counter()
    until: dict[int, int] = {}
    for i in sorted(range(len(joining)), key=lambda i: _rest(joining[i])):
        before[joining[i].request.client] += _rest(joining[i])
        until[i] = before[joining[i].request.client]
    return sorted(until, key=until.__getitem__)


def _oldest(joining: Sequence[Stream]) -> list[int]:
    """Everybody's first, then everybody's second, and so on; among those by age."""
    seen: Counter[str] = Counter()
    rank = []
    for stream in joining:
        rank.append(seen[stream.request.client])
        seen[stream.request.client] += 1
    return sorted(range(len(joining)), key=rank.__getitem__)
