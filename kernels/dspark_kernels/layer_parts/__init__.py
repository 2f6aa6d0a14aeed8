"""What stands between the products of a Llama-like layer: norms, rotary embedding, gated activation."""

from __future__ import annotations

from torch import Tensor

from dspark_kernels.dispatch import uses_triton
from dspark_kernels.layer_parts import reference

__all__ = ["add_rms_norm", "rms_norm", "rotate", "silu_mul"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if x.numel() and uses_triton(x.device):
        from dspark_kernels.layer_parts import triton

        return triton.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    if x.numel() and uses_triton(x.device):
        from dspark_kernels.layer_parts import triton

        return triton.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    if gate.numel() and uses_triton(gate.device):
        from dspark_kernels.layer_parts import triton

        return triton.silu_mul(gate, up)
    return reference.silu_mul(gate, up)


def rotate(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `reference.rotate`."""
    if query.numel() and uses_triton(query.device):
        from dspark_kernels.layer_parts import triton

        return triton.rotate(query, key, cos, sin, query_norm, key_norm, eps)
    return reference.rotate(query, key, cos, sin, query_norm, key_norm, eps)
