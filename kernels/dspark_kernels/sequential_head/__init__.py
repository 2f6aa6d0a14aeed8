"""The sequential head: the walk through a draft block, over the candidates that can win."""

from __future__ import annotations

from torch import Tensor

from dspark_kernels.dispatch import uses_triton
from dspark_kernels.sequential_head import reference
from dspark_kernels.sequential_head.reference import HeadWeights, Prepared, Walk, prepare
from dspark_kernels.streams import Sampling

__all__ = ["HeadWeights", "Prepared", "Walk", "prepare", "walk"]


def walk(prepared: Prepared, anchor: Tensor, weights: HeadWeights, sampling: Sampling) -> Walk:
    """See `reference.walk`."""
    if uses_triton(anchor.device):
        from dspark_kernels.sequential_head import triton

        return triton.walk(prepared, anchor, weights, sampling)
    return reference.walk(prepared, anchor, weights, sampling)
