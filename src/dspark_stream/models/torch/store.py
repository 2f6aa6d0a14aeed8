"""Keys and values as torch's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from dspark_kernels.ragged_attention import PAD
from dspark_stream.models.cache import Extent, KVShape


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
