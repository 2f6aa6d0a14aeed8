"""Token slots in the kernels' layout."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_kernels.cpu import Store
from dspark_stream.models.cache import Extent, KVShape


class NativeStore:
    """Keys and values of two bytes; with a ring only a stream's latest positions (`Extent.context`)."""

    def __init__(self, shapes: Sequence[KVShape], slots: int, ring: int = 0) -> None:
        self.arrays = Store.zeros(len(shapes), slots, shapes[0].heads, shapes[0].key_dim, ring)
        self.place = self.arrays.place

    def clear(self, extent: Extent) -> None:
        """See `Store.clear`."""
        ring = self.arrays.ring
        self.arrays.clear(*((extent.context, min(extent.size, ring)) if ring else extent[:2]))
