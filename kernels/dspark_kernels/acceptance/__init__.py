"""Which drafts stand, and the bonus token, for a ragged batch of target rows."""

from __future__ import annotations

from torch import Tensor

from dspark_kernels.acceptance import reference
from dspark_kernels.acceptance.reference import Accepted
from dspark_kernels.dispatch import uses_triton
from dspark_kernels.streams import Drafts, Sampling

__all__ = ["Accepted", "accept"]


def accept(logits: Tensor, first: Tensor, length: Tensor, drafts: Drafts, sampling: Sampling) -> Accepted:
    """See `reference.accept`."""
    if uses_triton(logits.device):
        from dspark_kernels.acceptance import triton

        return triton.accept(logits, first, length, drafts, sampling)
    return reference.accept(logits, first, length, drafts, sampling)
