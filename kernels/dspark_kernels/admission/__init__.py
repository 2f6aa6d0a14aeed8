"""Confidence → calibrated survival → verification lengths → the rows of a packed target pass."""

from __future__ import annotations

from torch import Tensor

from dspark_kernels.admission import reference
from dspark_kernels.admission.reference import BUDGET, EARLY_STOP, FIXED, THRESHOLD, Admitted, Packed
from dspark_kernels.dispatch import uses_triton

__all__ = ["BUDGET", "EARLY_STOP", "FIXED", "THRESHOLD", "Admitted", "Packed", "admit", "pack"]


def admit(
    confidence: Tensor, temperature: Tensor, drafting: Tensor, active: Tensor, rule: Tensor, sps: Tensor, rows: int
) -> Admitted:
    """See `reference.admit`."""
    if uses_triton(confidence.device):
        from dspark_kernels.admission import triton

        return triton.admit(confidence, temperature, drafting, active, rule, sps, rows)
    return reference.admit(confidence, temperature, drafting, active, rule, sps, rows)


def pack(admitted: Admitted, tokens: Tensor, anchor: Tensor, position: Tensor, slot: Tensor, rows: int) -> Packed:
    """See `reference.pack`."""
    if uses_triton(tokens.device):
        from dspark_kernels.admission import triton

        return triton.pack(admitted, tokens, anchor, position, slot, rows)
    return reference.pack(admitted, tokens, anchor, position, slot, rows)
