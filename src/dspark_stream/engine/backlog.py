"""Context features that the drafter has not been given yet.

The drafter reads the features of every committed position, but only when it drafts. So what a pass leaves of a
stream's taps is kept here and handed over in one go: before the stream is drafted for, or when its room is full. A
stream that is not drafted for costs next to nothing, and a probe catches up in one product instead of many.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dspark_stream.models.cache import Extent, KVStore
from dspark_stream.models.drafter import Drafter

ROOM = 64
"""Positions kept of a stream: 0.7 MB of SmolLM2-135M's taps."""


class Backlog:
    """Where the taps of one stream's last positions are: rows of its last rounds' taps, n ≤ `ROOM` of them."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, int, int]] = []
        self.first = 0
        """Position of the first row."""
        self.count = 0

    def fits(self, rows: int) -> bool:
        """Whether so many more rows have a place."""
        return self.count + rows <= ROOM

    def add(self, taps: Tensor, row: int, count: int, position: int) -> None:
        """Append rows ``row`` … of a round's ``taps`` [B, taps·H]: ``count`` positions from ``position`` on.

        They follow the positions that are here. The tensor is kept, not copied, and shared by the round's streams.
        """
        if not self.count:
            self.first = position
        self._parts.append((taps, row, count))
        self.count += count

    def take(self) -> list[Tensor]:
        """Everything that is here, in order; nothing is left."""
        parts, self._parts, self.count = self._parts, [], 0
        return [taps[row : row + count] for taps, row, count in parts]


def hand_over(owed: Iterable[tuple[Extent, Backlog]], drafter: Drafter, store: KVStore) -> None:
    """Give the drafter all that these streams' backlogs keep, in one product."""
    positions: list[int] = []
    slots: list[int] = []
    parts: list[Tensor] = []
    for extent, backlog in owed:
        positions += range(backlog.first, backlog.first + backlog.count)
        slots += range(extent.slot + backlog.first, extent.slot + backlog.first + backlog.count)
        parts += backlog.take()
    if parts:
        drafter.append_context(torch.cat(parts), positions, slots, store)
