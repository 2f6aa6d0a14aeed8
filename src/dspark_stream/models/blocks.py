"""Quantised matrices in drafter checkpoints: rows of GGUF's blocks, as the CPU's kernels take them.

In a checkpoint such a tensor is bytes [rows, bytes of a row], and the config's `weight_blocks` says by name of which
type.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark_kernels.cpu import Source


class Blocks(NamedTuple):
    """A matrix [rows, columns] of blocks."""

    data: Tensor  # uint8 [rows, bytes of a row]
    source: Source

    @property
    def shape(self) -> torch.Size:
        """[rows, columns]."""
        row = self.source.nbytes(self.source.block)
        return torch.Size((self.data.shape[0], self.data.shape[1] * self.source.block // row))

    def dequantised(self) -> Tensor:
        """The matrix in float32."""
        import gguf

        kind = gguf.GGMLQuantizationType(int(self.source))
        return torch.from_numpy(np.ascontiguousarray(gguf.dequantize(self.data.numpy(), kind), dtype=np.float32))


def as_floats(matrix: Tensor | Blocks) -> Tensor:
    """A matrix of either kind in floats."""
    return matrix.dequantised() if isinstance(matrix, Blocks) else matrix


def quantised(matrix: Tensor, source: Source) -> Blocks:
    """A float matrix in blocks, rounded as the format's own library rounds."""
    import gguf

    kind = gguf.GGMLQuantizationType(int(source))
    return Blocks(torch.from_numpy(np.ascontiguousarray(gguf.quantize(matrix.float().numpy(), kind))), source)
