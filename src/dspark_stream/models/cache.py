"""Where streams keep their past: one fixed budget of token slots, handed out in contiguous extents.

A token slot holds the target's keys and values of one position for every layer, and the drafter's context keys and
values of the same position: they are reserved, kept and given back together (docs/decisions/002-kv-extents.md).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark_kernels.ragged_attention import PAD
from dspark_stream.errors import ConfigError

GRAIN = 16
"""Extents are multiples of this many token slots."""


class Extent(NamedTuple):
    """``size`` token slots from ``slot`` on; position i of the stream that owns it lies at ``slot + i``."""

    slot: int
    size: int


class ExtentAllocator:
    """First fit over a sorted free list that merges neighbours. Raises nothing: no room is None."""

    def __init__(self, total: int) -> None:
        self.total = total - total % GRAIN
        self.used = 0
        self._free: list[Extent] = [Extent(0, self.total)] if self.total else []

    def allocate(self, tokens: int) -> Extent | None:
        """An extent of at least ``tokens`` slots, or None while there is no stretch that long."""
        size = max(GRAIN, -(-tokens // GRAIN) * GRAIN)
        for i, hole in enumerate(self._free):
            if hole.size >= size:
                rest = Extent(hole.slot + size, hole.size - size)
                self._free[i : i + 1] = [rest] if rest.size else []
                self.used += size
                return Extent(hole.slot, size)
        return None

    def free(self, extent: Extent) -> None:
        """Give an extent back; it merges with the holes beside it."""
        self.used -= extent.size
        insort(self._free, extent)
        merged: list[Extent] = []
        for hole in self._free:
            if merged and merged[-1].slot + merged[-1].size == hole.slot:
                merged[-1] = Extent(merged[-1].slot, merged[-1].size + hole.size)
            else:
                merged.append(hole)
        self._free = merged


class KVShape(NamedTuple):
    """One layer's keys and values for one position."""

    heads: int
    key_dim: int
    value_dim: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that one position takes in this layer."""
        return self.heads * (self.key_dim + self.value_dim) * dtype.itemsize


class KVStore:
    """Keys and values of one model's layers over all token slots.

    Slots are written before they count; attention may look a little past what counts, masked, so all start at zero.
    """

    def __init__(self, shapes: Sequence[KVShape], slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys: list[Tensor] = []  # L x [N, Hk, D]
        self.values: list[Tensor] = []  # L x [N, Hk, Dv]
        for shape in shapes:
            self.keys.append(_zeros((slots + PAD, shape.heads, shape.key_dim), dtype, device))
            self.values.append(_zeros((slots + PAD, shape.heads, shape.value_dim), dtype, device))

    def clear(self, extent: Extent) -> None:
        """Zero an extent."""
        for tensor in (*self.keys, *self.values):
            tensor[extent.slot : extent.slot + extent.size] = 0

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Put rows ``key`` [T, Hk, D] and ``value`` [T, Hk, Dv] at ``slots`` [T]."""
        self.keys[layer].index_copy_(0, slots, key)
        self.values[layer].index_copy_(0, slots, value)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, cost no memory until they are written: the system hands out zeroed pages by itself."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


def slots_for_budget(budget_bytes: int, bytes_per_token: int, longest: int) -> int:
    """How many token slots ``budget_bytes`` buys.

    Raises:
        ConfigError: less than one stream of ``longest`` tokens; names the smallest budget that would do.
    """
    slots = budget_bytes // bytes_per_token
    if slots < longest + GRAIN:
        need = -(-(longest + GRAIN) * bytes_per_token // 2**20)
        raise ConfigError(
            f"kv_memory of {budget_bytes / 2**20:.0f} MiB holds {slots} tokens at {bytes_per_token} bytes each, less "
            f"than one stream of max_model_len: give at least {need}MiB or a smaller max_model_len",
            param="kv_memory",
        )
    return slots
