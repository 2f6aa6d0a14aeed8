"""Between a layer's products on a GPU, one launch each. Contract in reference.py."""

import torch
import triton
import triton.language as tl

MOST = 1024
"""Entries that a program of `_silu_mul` takes."""


@triton.jit
def _rms_norm(x_ptr, residual_ptr, weight_ptr, total_ptr, out_ptr, H, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * H + h, mask=h < H, other=0.0).to(tl.float32)
    if ADD:
        total = (x + tl.load(residual_ptr + row * H + h, mask=h < H, other=0.0).to(tl.float32)).to(
            x_ptr.dtype.element_ty
        )
        tl.store(total_ptr + row * H + h, total, mask=h < H)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    scaled = x * tl.math.rsqrt(tl.sum(x * x, 0) / H + eps)
    rounded = scaled.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * H + h, (rounded * weight).to(out_ptr.dtype.element_ty), mask=h < H)


@triton.jit
def _silu_mul(gate_ptr, up_ptr, out_ptr, stride_gate, stride_up, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * stride_gate + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + n, mask=n < N, other=0.0).to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * N + n, (active * up).to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _rotate(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_out_ptr, k_out_ptr, eps, stride_q, stride_k,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    i = tl.arange(0, BLOCK)
    there = i < HALF
    if head < HEADS_Q:
        from_ptr = q_ptr + row * stride_q + head * D
        to_ptr = q_out_ptr + (row * HEADS_Q + head) * D
        norm_ptr = q_norm_ptr
    else:
        from_ptr = k_ptr + row * stride_k + (head - HEADS_Q) * D
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
    out = torch.empty_like(x)
    _launch_norm(x, None, weight, x, out, eps)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.add_rms_norm`."""
    x, residual = x.contiguous(), residual.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(x, residual, weight, total, out, eps)
    return total, out


def _launch_norm(x, residual, weight, total, out, eps) -> None:
    h = x.shape[-1]
    block = triton.next_power_of_2(h)
    _rms_norm[(x.numel() // h,)](
        x, x if residual is None else residual, weight, total, out, h, eps,
        ADD=residual is not None, BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., n] as rows whose entries lie beside each other; a part of wider rows stays where it is."""
    x = x.flatten(0, -2) if x.dim() != 2 else x
    return x if x.stride(-1) == 1 else x.contiguous()


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `reference.silu_mul`."""
    shape, gate, up = gate.shape, _rows_of(gate), _rows_of(up)
    rows, n = gate.shape
    out = torch.empty(rows, n, dtype=gate.dtype, device=gate.device)
    _silu_mul[(rows, triton.cdiv(n, MOST))](gate, up, out, gate.stride(0), up.stride(0), n, BLOCK=MOST, num_warps=4)
    return out.view(shape)


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
    cos, sin = cos.contiguous(), sin.contiguous()
    rows, heads_q, d = query.shape
    heads_k = key.shape[1]
    query, key = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (query, key))
    q_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    k_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    normed = query_norm is not None and key_norm is not None
    _rotate[(rows, heads_q + heads_k)](
        query, key, cos, sin, query_norm if normed else cos, key_norm if normed else cos, q_out, k_out, eps,
        query.stride(0), key.stride(0),
        HEADS_Q=heads_q, HEADS_K=heads_k, D=d, BLOCK=triton.next_power_of_2(d // 2), NORMED=normed, num_warps=1,
    )  # fmt: skip
    return q_out, k_out
