"""Context features on their way from the target's passes to the drafter.

The drafter reads the features of every position, the prompt's too, but only when it drafts. So what a pass leaves of a
stream's taps is kept here and handed over in one go: before the stream is drafted for, or when its room is full. A
stream that is never drafted for costs next to nothing, and a look catches up in a few products instead of many.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from math import inf
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dspark_stream.models.cache import Extent
from dspark_stream.models.protocols import Drafter, Store

ROOM, TOGETHER = 64, 128 * 2**20
"""Positions that may be kept of every stream, and bytes of all together: where there are few streams, more of each.
64 positions of SmolLM2-135M's taps are 0.7 MB."""
HANDED_A_ROUND = 512
"""Positions that a round hands over for want of room; the rest waits for the next round."""
PIECE = 256
"""Positions of one product: of more, what one step of it writes would be out of the caches before the next reads it."""
PASSES = 16
"""Passes over anchors alone whose rows are told apart by stream together, in a loop that the caches still know."""


def room(streams: int, taps: Tensor) -> int:
    """Positions that each of so many streams may keep of ``taps`` like these [B, taps·H]."""
    return max(ROOM, TOGETHER // (streams * taps.shape[1] * taps.element_size()))


class Backlog:
    """Where the taps of one stream's last positions are: rows of its last passes' taps."""

    def __init__(self) -> None:
        self._parts: deque[tuple[Tensor, int, int]] = deque()
        self.first = 0
        """Position of the first row."""
        self.count = 0

    def add(self, taps: Tensor, row: int, count: int, position: int, window: int = 0) -> None:
        """Append rows ``row`` … of a pass's ``taps`` [B, taps·H]: ``count`` positions from ``position`` on.

        They follow the positions that are here. The tensor is kept, not copied, and shared by the pass's streams.
        ``window``: of more positions only the latest so many will ever be seen (0: all).
        """
        if not self.count:
            self.first = position
        self._parts.append((taps, row, count))
        self.count += count
        if window and self.count > window:
            self.take(self.count - window)

    @property
    def end(self) -> int:
        """The position after the last row."""
        return self.first + self.count

    def look(self, most: int) -> list[Tensor]:
        """The first positions that are here, in order, at most so many."""
        seen: list[Tensor] = []
        for taps, row, count in self._parts:
            if most <= 0:
                break
            some = min(count, most)
            seen.append(taps[row : row + some])
            most -= some
        return seen

    def take(self, most: int) -> list[Tensor]:
        """The same, and they are here no more; the others stay."""
        taken = self.look(most)
        for some in map(len, taken):
            taps, row, count = self._parts.popleft()
            if some < count:
                self._parts.appendleft((taps, row + some, count - some))
            self.first, self.count = self.first + some, self.count - some
        return taken

    def cut(self, end: int) -> None:
        """Forget the rows of positions from ``end`` on."""
        while self._parts and self.end > end:
            taps, row, count = self._parts.pop()
            kept = max(0, count - (self.end - end))
            if kept:
                self._parts.append((taps, row, kept))
            self.count -= count - kept


class Owner(Protocol):
    """What is read of a stream."""

    extent: Extent
    position: int
    backlog: Backlog
    max_chunk_gap_ms: float


class Part(NamedTuple):
    """Rows of a pass's taps that stand, all of one stream."""

    stream: Owner
    row: int
    size: int
    position: int
    """Of the first."""
    soon: bool
    """Whether they are likely to be handed over in the next round."""


class Context:
    """All streams'. Says of its time what is not the round's own: catching up on what earlier rounds left.

    Args:
        drafter, store: who is given them, and where they go; None: nothing is kept.
        waits: whether they may wait here; captured rounds look nowhere but into the store.
    """

    def __init__(self, drafter: Drafter | None, store: Store | None, *, waits: bool = True) -> None:
        self._drafter, self._store, self._waits = drafter, store, waits
        self._anchors: list[tuple[Tensor, Sequence[Owner], list[int]]] = []
        """Passes that no backlog knows of yet, oldest first, and the positions of their rows."""

    def keep(self, taps: Tensor, parts: Sequence[Part], company: Sequence[Owner], most: int = sys.maxsize) -> float:
        """Keep these rows of ``taps`` [B, taps·H] for when their streams are drafted for.

        Whoever has no room left hands over at once, ``most`` positions of all. Returns the milliseconds of that.
        ``company``: whoever shares the room.
        """
        self.tell_apart()
        if self._drafter is None or not parts:
            return 0.0
        # apart: of what is soon handed over all rows may be kept, of what waits those that stand
        for soon in (True, False):
            mine = [part for part in parts if part.soon is soon]
            wanted = sum(part.size for part in mine)
            if not mine:
                continue
            whole = wanted == len(taps) or (soon and 2 * wanted >= len(taps))
            rows = [] if whole else [row for part in mine for row in range(part.row, part.row + part.size)]
            kept = taps if whole else taps[rows]
            at = 0
            for stream, row, size, position, _ in mine:
                stream.backlog.add(kept, row if whole else at, size, position, self._drafter.context_window)
                at += size
        return self._make_room([part.stream for part in parts], taps, company, most)

    def keep_anchors(self, taps: Tensor, streams: Sequence[Owner], most: int = sys.maxsize) -> float:
        """`keep` of a pass over nothing but the anchors of these streams, who are the company and all draft."""
        self._anchors.append((taps, streams, [stream.position for stream in streams]))
        passes = len(self._anchors)
        if passes < PASSES and (passes + 1) * len(streams) <= HANDED_A_ROUND:
            return 0.0
        self.tell_apart()
        return self._make_room(streams, taps, streams, most)

    def owed(self, streams: Sequence[Owner]) -> list[int]:
        """Positions that are kept of each of these streams."""
        self.tell_apart()
        return [stream.backlog.count for stream in streams]

    def deliver(self, streams: Sequence[Owner]) -> float:
        """Give the drafter all that is kept of these streams.

        Returns the milliseconds of it that went to more than the round before can have left.
        """
        if self._drafter is None:
            return 0.0
        owed = self.owed(streams)
        late = sum(max(0, count - 1 - self._drafter.gamma) for count in owed)
        return self._hand_over(streams) * late / max(1, sum(owed))

    def tell_apart(self) -> None:
        """The rows of passes over anchors go to their streams' backlogs: nothing is kept of streams that are gone."""
        if self._drafter is None:
            return
        for taps, streams, positions in self._anchors:
            for row, (stream, position) in enumerate(zip(streams, positions, strict=True)):
                stream.backlog.add(taps, row, 1, position, self._drafter.context_window)
        self._anchors.clear()

    def _make_room(self, streams: Sequence[Owner], taps: Tensor, company: Sequence[Owner], most: int) -> float:
        """Who of these streams keeps too much of ``taps`` like these hands over; milliseconds of that."""
        # where rounds are bounded, nobody should have much to catch up with
        bounded = any(stream.max_chunk_gap_ms < inf for stream in company)
        least = 0 if not self._waits else ROOM if bounded else room(len(company), taps)
        full = [stream for stream in streams if stream.backlog.count > least]
        return self._hand_over(full, most) if full else 0.0

    def _hand_over(self, streams: Sequence[Owner], most: int = sys.maxsize) -> float:
        """Milliseconds that it took."""
        assert self._drafter is not None
        assert self._store is not None
        begun = time.perf_counter()
        hand_over([(s.extent, s.backlog) for s in streams], self._drafter, self._store, most)
        return (time.perf_counter() - begun) * 1e3


def hand_over(owed: Iterable[tuple[Extent, Backlog]], drafter: Drafter, store: Store, most: int = sys.maxsize) -> None:
    """Give the drafter what these streams' backlogs keep, ``most`` positions of it, in as few products as go well.

    They keep it where this fails: it can be done again.
    """
    positions: list[int] = []
    slots: list[int] = []
    parts: list[Tensor] = []
    ring = drafter.ring
    given: list[tuple[Backlog, int]] = []
    for extent, backlog in owed:
        at = backlog.first
        parts_of_stream = backlog.look(most)
        given.append((backlog, sum(map(len, parts_of_stream))))
        most -= given[-1][1]
        for part in parts_of_stream:
            for piece in (part,) if len(part) <= PIECE else part.split(PIECE):
                if len(positions) + len(piece) > PIECE:
                    drafter.append_context(_joined(parts), positions, slots, store)
                    positions, slots, parts = [], [], []
                parts.append(piece)
                positions += range(at, at + len(piece))
                slots += extent.context_slots(range(at, at + len(piece)), ring)
                at += len(piece)
    if parts:
        drafter.append_context(_joined(parts), positions, slots, store)
    for backlog, count in given:
        backlog.take(count)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
