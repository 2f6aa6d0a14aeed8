"""Where streams keep their past: one fixed budget of token slots, handed out in contiguous extents.

A token slot holds the target's keys and values of one position for every layer, and the drafter's context keys and
values of the same position: they are reserved, kept and given back together (docs/decisions/002-kv-extents.md). A
drafter with a window keeps the latest positions only, in a ring of each stream's own (029).
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


class ExtentAllocator:
    """First fit over a sorted free list that merges neighbours, and a ring for each stream beside it. Raises nothing:
    no room is None.

    Args:
        total: token slots.
        ring: slots of a stream's ring in the drafter's store; 0: there are none.
        seats: how many rings there are.
    """

    def __init__(self, total: int, ring: int = 0, seats: int = 0) -> None:
        self.total, self.ring = total - total % GRAIN, ring
        self.used = 0
        self._free: list[tuple[int, int]] = [(0, self.total)] if self.total else []
        """Stretches: first slot and size."""
        self._rings = [ring * seat for seat in reversed(range(seats))]

    def allocate(self, tokens: int) -> Extent | None:
        """An extent of at least ``tokens`` slots, or None while there is no stretch that long, or no ring."""
        size = max(GRAIN, -(-tokens // GRAIN) * GRAIN)
        if self.ring and not self._rings:
            return None
        for i, (slot, room) in enumerate(self._free):
            if room >= size:
                self._free[i : i + 1] = [(slot + size, room - size)] if room > size else []
                self.used += size
                return Extent(slot, size, self._rings.pop() if self.ring else 0)
        return None

    def free(self, extent: Extent) -> None:
        """Give an extent back; it merges with the stretches beside it."""
        self.used -= extent.size
        if self.ring:
            self._rings.append(extent.context)
        insort(self._free, (extent.slot, extent.size))
        merged: list[tuple[int, int]] = []
        for slot, size in self._free:
            if merged and sum(merged[-1]) == slot:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((slot, size))
        self._free = merged


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
