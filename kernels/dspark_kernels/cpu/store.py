"""Keys and values of all token slots, as the kernels lay them out."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import NamedTuple

import numpy as np

from dspark_kernels.cpu.binding import Words, must

LANES = 16
"""Token slots of a key tile."""
RING_GRAIN = 64
"""Rings are multiples of this many token slots."""


class Place(NamedTuple):
    """A store's addresses."""

    addresses: tuple[int, int, int, int]
    """Of keys and values, the token slots that they have, and the ring."""
    shape: tuple[int, int, int]
    """Layers, key heads, head size."""
    store: Store
    """Kept for as long as its addresses are."""


class Store(NamedTuple):
    """Keys [L, Hk, N/16, D, 16] and values [L, Hk, N, D] of all token slots, two bytes each.

    Float16, or where `Context.kv_bfloat` bfloat16 with the layout inside 16 slots that csrc/attention.h describes.
    """

    keys: Words
    values: Words
    ring: int = 0
    """Positions of a stream that are kept, a multiple of `RING_GRAIN`: position i at its first slot + i mod ring. 0:
    all."""

    @staticmethod
    def zeros(layers: int, slots: int, kv_heads: int, head_size: int, ring: int = 0) -> Store:
        """Room for ``slots`` (rounded up to whole tiles); costs no memory until it is written."""
        must(ring >= 0 and ring % RING_GRAIN == 0, f"a ring of {ring}")
        tiles = -(-slots // LANES)
        return Store(
            _untouched(layers, kv_heads, tiles, head_size, LANES),
            _untouched(layers, kv_heads, tiles * LANES, head_size),
            ring,
        )

    @property
    def place(self) -> Place:
        """Where it is, for `Llama.run` and others: asked for once, since it takes time."""
        layers, kv_heads, slots, head_size = self.values.shape
        must(self.keys.shape == (layers, kv_heads, slots // LANES, head_size, LANES), "keys of other values")
        addresses = self.keys.ctypes.data, self.values.ctypes.data, slots, self.ring
        return Place(addresses, (layers, kv_heads, head_size), self)

    def clear(self, slot: int, size: int) -> None:
        """Zero whole tiles from ``slot`` on."""
        first, last = slot // LANES, -(-(slot + size) // LANES)
        self.keys[:, :, first:last] = 0
        self.values[:, :, first * LANES : last * LANES] = 0


def _untouched(*shape: int) -> Words:
    """Zeros that take memory page by page as they are written.

    Small pages: every head of every layer has a part of its own, and large ones would round each up by megabytes.
    """
    memory = mmap.mmap(-1, max(1, 2 * math.prod(shape)))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint16, count=math.prod(shape)).reshape(shape)
