"""The contract of what stands between a layer's products, in plain torch.

The library runs each of these as five to ten small operations, and at one row a launch costs more than the work.
Rounded to the tensors' precision where the library rounds, but for sums of rotated halves, which are rounded once.

Symbols: T rows, H hidden size, Hq and Hk query and key heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] over its root mean square, times ``weight`` [H]."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual`` + x, all [..., H], and the `rms_norm` of that sum."""
    total = residual + x
    return total, rms_norm(total, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate·σ(gate) times ``up``, all [..., n]."""
    return torch.nn.functional.silu(gate) * up


def rotate(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hk, D]
    cos: Tensor,  # [T, D]
    sin: Tensor,  # [T, D]
    query_norm: Tensor | None = None,  # [D]
    key_norm: Tensor | None = None,  # [D]
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:  # [T, Hq, D], [T, Hk, D]
    """Rotary embedding of halves, after each head's own norm where there are weights for one."""

    def rotated(x: Tensor, norm: Tensor | None) -> Tensor:
        wide = (x if norm is None else rms_norm(x, norm, eps)).float()
        low, high = wide.chunk(2, -1)
        turned = torch.cat((-high, low), -1)
        out = wide * cos.float().unsqueeze(1) + turned * sin.float().unsqueeze(1)
        return out.to(x.dtype)

    return rotated(query, query_norm), rotated(key, key_norm)
