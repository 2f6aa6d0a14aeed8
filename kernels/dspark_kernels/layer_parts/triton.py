"""Between a layer's products on a GPU, one launch each. Contract in reference.py."""

import torch
import triton
import triton.language as tl

MOST = 1024
"""Entries that a program of `_silu_mul` takes."""


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, H, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * H + h, mask=h < H, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    scaled = x * tl.math.rsqrt(tl.sum(x * x, 0) / H + eps)
    rounded = scaled.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * H + h, (rounded * weight).to(out_ptr.dtype.element_ty), mask=h < H)


@triton.jit(do_not_specialize=["COUNT"])
def _silu_mul(gate_ptr, up_ptr, out_ptr, COUNT, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < COUNT, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < COUNT, other=0.0).to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + at, (active * up).to(out_ptr.dtype.element_ty), mask=at < COUNT)


@triton.jit
def _rotate(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_out_ptr, k_out_ptr, eps,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    i = tl.arange(0, BLOCK)
    there = i < HALF
    if head < HEADS_Q:
        from_ptr = q_ptr + (row * HEADS_Q + head) * D
        to_ptr = q_out_ptr + (row * HEADS_Q + head) * D
        norm_ptr = q_norm_ptr
    else:
        from_ptr = k_ptr + (row * HEADS_K + head - HEADS_Q) * D
        to_ptr = k_out_ptr + (row * HEADS_K + head - HEADS_Q) * D
        norm_ptr = k_norm_ptr
    low = tl.load(from_ptr + i, mask=there, other=0.0).to(tl.float32)
    high = tl.load(from_ptr + HALF + i, mask=there, other=0.0).to(tl.float32)
    kind = q_out_ptr.dtype.element_ty
    if NORMED:
        scale = tl.math.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / D + eps)
        low = (low * scale).to(kind).to(tl.float32) * tl.load(norm_ptr + i, mask=there, other=0.0).to(tl.float32)
        high = (high * scale).to(kind).to(tl.float32)
        high = high * tl.load(norm_ptr + HALF + i, mask=there, other=0.0).to(tl.float32)
        low = low.to(kind).to(tl.float32)
        high = high.to(kind).to(tl.float32)
    cos = cos_ptr + row * D + i
    sin = sin_ptr + row * D + i
    turned_low = low * tl.load(cos, mask=there, other=0.0).to(tl.float32)
    turned_low -= high * tl.load(sin, mask=there, other=0.0).to(tl.float32)
    turned_high = high * tl.load(cos + HALF, mask=there, other=0.0).to(tl.float32)
    turned_high += low * tl.load(sin + HALF, mask=there, other=0.0).to(tl.float32)
    tl.store(to_ptr + i, turned_low.to(kind), mask=there)
    tl.store(to_ptr + HALF + i, turned_high.to(kind), mask=there)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `reference.rms_norm`."""
    x = x.contiguous()
    h = x.shape[-1]
    block = triton.next_power_of_2(h)
    out = torch.empty_like(x)
    _rms_norm[(x.numel() // h,)](x, weight, out, h, eps, BLOCK=block, num_warps=max(1, min(8, block // 256)))
    return out


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `reference.silu_mul`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _silu_mul[(triton.cdiv(gate.numel(), MOST),)](gate, up, out, gate.numel(), BLOCK=MOST, num_warps=4)
    return out


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.rotate`."""
    query, key, cos, sin = (x.contiguous() for x in (query, key, cos, sin))
    rows, heads_q, d = query.shape
    heads_k = key.shape[1]
    q_out, k_out = torch.empty_like(query), torch.empty_like(key)
    normed = query_norm is not None and key_norm is not None
    _rotate[(rows, heads_q + heads_k)](
        query, key, cos, sin, query_norm if normed else cos, key_norm if normed else cos, q_out, k_out, eps,
        HEADS_Q=heads_q, HEADS_K=heads_k, D=d, BLOCK=triton.next_power_of_2(d // 2), NORMED=normed, num_warps=1,
    )  # fmt: skip
    return q_out, k_out
