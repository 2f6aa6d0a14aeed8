"""Where streams keep their past: one fixed budget of token slots, handed out in contiguous extents.

A token slot holds the target's keys and values of one position for every layer, and the drafter's context keys and
values of the same position: they are reserved, kept and given back together (docs/decisions/002-kv-extents.md).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dspark_stream.errors import ConfigError

GRAIN = 16
"""Extents are multiples of this many token slots."""


class Extent(NamedTuple):
    """``size`` token slots from ``slot`` on; position i of the stream that owns it lies at ``slot + i``.

    The drafter's context of the same positions lies in its own store: from ``slot`` on too, or, where it keeps the
    latest ones only, in a ring that begins at ``context`` (`context_slots`).
    """

    slot: int
    size: int
    context: int = 0

    def context_slots(self, positions: Sequence[int], ring: int) -> list[int]:
        """Where the drafter's store has those positions, with a ring of that many slots (0: with none)."""
        return [self.context + p % ring for p in positions] if ring else [self.slot + p for p in positions]


class _Holes(NamedTuple):
    """A sorted list of stretches that are free: (first, size)."""

    free: list[tuple[int, int]]

    def take(self, size: int) -> int | None:
        """The first slot of the first stretch that is long enough."""
        for i, (first, room) in enumerate(self.free):
            if room >= size:
                self.free[i : i + 1] = [(first + size, room - size)] if room > size else []
                return first
        return None

    def give(self, first: int, size: int) -> None:
        """Give a stretch back; it merges with the holes beside it."""
        insort(self.free, (first, size))
        merged: list[tuple[int, int]] = []
        for at, room in self.free:
            if merged and sum(merged[-1]) == at:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((at, room))
        self.free[:] = merged


class ExtentAllocator:
    """First fit. Raises nothing: no room is None.

    Args:
        total: token slots.
        ring: slots of a stream's ring in the drafter's store; 0: there are none.
        ring_total: slots of that store.
    """

    def __init__(self, total: int, ring: int = 0, ring_total: int = 0) -> None:
        self.total, self.ring = total - total % GRAIN, ring
        self.used = 0
        self._slots = _Holes([(0, self.total)] if self.total else [])
        self._rings = _Holes([(0, ring_total)] if ring_total else [])

    def _ring_of(self, size: int) -> int:
        """Whoever is shorter than a ring never comes round."""
        return min(size, self.ring)

    def allocate(self, tokens: int) -> Extent | None:
        """An extent of at least ``tokens`` slots, or None while there is no stretch that long."""
        size = max(GRAIN, -(-tokens // GRAIN) * GRAIN)
        slot = self._slots.take(size)
        if slot is None:
            return None
        context = self._rings.take(self._ring_of(size)) if self.ring else 0
        if context is None:
            self._slots.give(slot, size)
            return None
        self.used += size
        return Extent(slot, size, context)

    def free(self, extent: Extent) -> None:
        """Give an extent back."""
        self.used -= extent.size
        self._slots.give(extent.slot, extent.size)
        if self.ring:
            self._rings.give(extent.context, self._ring_of(extent.size))


class KVShape(NamedTuple):
    """One layer's keys and values for one position."""

    heads: int
    key_dim: int
    value_dim: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that one position takes in this layer."""
        return self.heads * (self.key_dim + self.value_dim) * dtype.itemsize


def slots_for_budget(budget_bytes: int, bytes_per_token: int, longest: int, taken_bytes: int = 0) -> int:
    """How many token slots ``budget_bytes`` buys, of which ``taken_bytes`` go to the drafter's rings.

    Raises:
        ConfigError: less than one stream of ``longest`` tokens; names the smallest budget that would do.
    """
    slots = max(0, budget_bytes - taken_bytes) // bytes_per_token
    if slots < longest + GRAIN:
        need = -(-((longest + GRAIN) * bytes_per_token + taken_bytes) // 2**20)
        raise ConfigError(
            f"kv_memory of {budget_bytes / 2**20:.0f} MiB holds {slots} tokens at {bytes_per_token} bytes each, less "
            f"than one stream of max_model_len: give at least {need}MiB or a smaller max_model_len",
            param="kv_memory",
        )
    return slots
