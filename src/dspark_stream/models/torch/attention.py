"""How library layers reach our attention: one registered function, one object a forward pass.

`transformers` layers look their attention up by name and hand every keyword argument through. families.py registers
``"dspark"``, and we pass the pass's own object as ``attend``; it decides what the rows attend to. So the library's own
forward code serves every family, ragged batches included, and no mask is ever built.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dspark_kernels.ragged_attention import Segment, SegmentTable, attend_table, ragged_attention
from dspark_stream.models.cache import KVShape
from dspark_stream.models.torch.store import KVStore

ATTENTION_NAME = "dspark"


class Attend(Protocol):
    """What the rows of one forward pass attend to."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """query [T, Hq, D], key [T, Hk, D], value [T, Hk, Dv] → [T, Hq, Dv]."""


class StoreAttend:
    """Rows write their keys and values to their slots, then attend to their own stream's positions."""

    def __init__(self, store: KVStore, slots: Tensor, segments: list[Segment], *, causal: bool) -> None:
        self.store, self.slots, self.segments, self.causal = store, slots, segments, causal
        self._masks: dict[object, list[Tensor | None]] = {}
        self._tables: dict[object, SegmentTable] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See `Attend`."""
        self.store.write(layer, self.slots, key, value)
        return ragged_attention(
            query,
            self.store.keys[layer],
            self.store.values[layer],
            self.segments,
            scale=scale,
            causal=self.causal,
            window=window,
            masks=self._masks,
            tables=self._tables,
        )


class TableAttend:
    """`StoreAttend` over segments that only the device knows; what a captured round uses.

    Slots of rows of nobody point at the store's last slot, which no stream owns.
    """

    def __init__(self, store: KVStore, slots: Tensor, table: SegmentTable, *, causal: bool) -> None:
        self.store, self.table, self.causal = store, table, causal
        self.slots = torch.where(slots < 0, store.keys[0].shape[0] - 1, slots)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See `Attend`."""
        self.store.write(layer, self.slots, key, value)
        return attend_table(
            query,
            self.store.keys[layer],
            self.store.values[layer],
            self.table,
            scale=scale,
            causal=self.causal,
            window=window,
        )


class ProbeAttend:
    """Attends to nothing and notes each layer's key and value shapes: how a model's cache geometry is learnt."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See `Attend`."""
        self.shapes[layer] = KVShape(key.shape[1], key.shape[2], value.shape[2])
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])


def int_tensor(values: list[int], device: torch.device) -> Tensor:
    """A vector of int64 on ``device``."""
    return torch.tensor(values, dtype=torch.long, device=device)
