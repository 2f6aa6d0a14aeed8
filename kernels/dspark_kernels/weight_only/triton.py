"""Few rows times quantised weights on a GPU: bound by reading the weights, so they are read once, packed as they are.

Contract in reference.py. A program takes some outputs and a share of the inputs; shares are added in a fixed order by a
second launch, so a row's result does not depend on which program was first.
"""

import torch
import triton
import triton.language as tl

from dspark_kernels.weight_only.reference import GROUP, Quantised

BLOCK_N, MOST_M = 32, 64
"""Outputs of a program, and rows that it takes at most: weights are read once for so many."""
PROGRAMS = 1024
"""Shares are made until there are about this many programs: eight for each multiprocessor of an H100."""


@triton.jit(do_not_specialize=["M", "SHARE"])
def _product(
    x_ptr, packed_ptr, scale_ptr, offset_ptr, out_ptr,
    M, N, GROUPS, SHARE, stride_xm,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    HALF: tl.constexpr = GROUP // 2
    i = tl.arange(0, HALF)
    row = n.to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(share * SHARE, tl.minimum((share + 1) * SHARE, GROUPS)):
        at = x_ptr + m[:, None] * stride_xm + group * GROUP + i[None, :]
        below = tl.load(at, mask=(m < M)[:, None], other=0.0)
        above = tl.load(at + HALF, mask=(m < M)[:, None], other=0.0)
        scale = tl.load(scale_ptr + row * GROUPS + group, mask=n < N, other=0.0).to(tl.float32)
        if BITS == 8:
            w_at = packed_ptr + row[None, :] * (GROUPS * GROUP) + group * GROUP + i[:, None]
            low = tl.load(w_at, mask=(n < N)[None, :], other=0)
            high = tl.load(w_at + HALF, mask=(n < N)[None, :], other=0)
        else:
            w_at = packed_ptr + row[None, :] * (GROUPS * HALF) + group * HALF + i[:, None]
            both = tl.load(w_at, mask=(n < N)[None, :], other=0)
            low = both & 15
            high = both >> 4
        # small integers are exact in every precision: scales come after the sum
        total = tl.dot(below, low.to(below.dtype), input_precision="ieee")
        total += tl.dot(above, high.to(above.dtype), input_precision="ieee")
        acc += total * scale[None, :]
        if BITS == 4:
            offset = tl.load(offset_ptr + row * GROUPS + group, mask=n < N, other=0.0).to(tl.float32)
            inputs = tl.sum(below.to(tl.float32), 1) + tl.sum(above.to(tl.float32), 1)
            acc += inputs[:, None] * offset[None, :]
    out = out_ptr + (share.to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["SHARES"])
def _sum(part_ptr, out_ptr, COUNT, SHARES, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for share in range(0, SHARES):
        total += tl.load(part_ptr + share * COUNT + at, mask=at < COUNT, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < COUNT)


def linear(x: torch.Tensor, weight: Quantised) -> torch.Tensor:
    """See `reference.linear`."""
    rows = x.flatten(0, -2)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    m, n, groups = rows.shape[0], weight.packed.shape[0], weight.scale.shape[1]
    block_m = max(16, min(MOST_M, triton.next_power_of_2(m)))
    tiles = triton.cdiv(n, BLOCK_N)
    shares = max(1, min(groups, PROGRAMS // (tiles * triton.cdiv(m, MOST_M))))
    share = triton.cdiv(groups, shares)
    shares = triton.cdiv(groups, share)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    part = out if shares == 1 else torch.empty(shares, m, n, dtype=torch.float32, device=x.device)
    _product[(tiles, shares, triton.cdiv(m, block_m))](
        rows, weight.packed, weight.scale, weight.scale if weight.offset is None else weight.offset, part,
        m, n, groups, share, rows.stride(0), BITS=weight.bits, GROUP=GROUP, BLOCK_M=block_m, BLOCK_N=BLOCK_N,
        num_warps=2 if block_m == 16 else 4, num_stages=4,
    )  # fmt: skip
    if shares > 1:
        _sum[(triton.cdiv(m * n, 1024),)](part, out, m * n, shares, BLOCK=1024, num_warps=4)
    return out.view(*x.shape[:-1], n)
