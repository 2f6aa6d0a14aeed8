"""Ragged attention on a GPU: a program for each (stream's rows, key head, split of the keys). Contract: reference.py.

Rows and query heads that share a key head are folded into one tile, so keys and values are read once for all of them.
A split always covers the same positions of a stream, however many rows stand beside: a row's sums are grouped in the
same way in a round of one row and of eight (docs/decisions/007 asks the same of the CPU).
"""

import torch
import triton
import triton.language as tl

from dspark_kernels.ragged_attention.reference import SegmentTable

MOST_SPLITS, LEAST_SPLIT = 32, 256
"""Splits of a stream's past at most, and positions of one at least; beyond their product a split is doubled."""
MARGIN = 512
"""Rows that a pass may have of one stream before splits grow with them: whatever is below has the same splits."""
BOUNDS = ["window", "tiles", "tile_rows", "most_rows", "splits", "margin"]
"""Arguments that differ from batch to batch: machine code does not depend on whether they are 1 or even."""


@triton.jit
def _split_size(start, splits, margin, LEAST: tl.constexpr):
    """Positions of one split, by where the stream stands and nothing else: short contexts have short splits."""
    least = tl.cdiv(start + margin, splits)
    size = start * 0 + LEAST
    for _ in tl.static_range(16):
        size = tl.where(size < least, size * 2, size)
    return size


@triton.jit(do_not_specialize=BOUNDS)
def _attend(
    q_ptr, k_ptr, v_ptr, acc_ptr, max_ptr, sum_ptr,
    row_ptr, rows_ptr, slot_ptr, start_ptr,
    scale, window, tiles, tile_rows, splits, margin,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    HEADS_Q: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.load(rows_ptr + segment)
    if tile * tile_rows >= rows:
        return
    start = tl.load(start_ptr + segment)
    first_row = tl.load(row_ptr + segment)
    slot = tl.load(slot_ptr + segment).to(tl.int64)

    m = tl.arange(0, BLOCK_M)
    row = tile * tile_rows + m // GROUP  # of the segment
    mine = (m < tile_rows * GROUP) & (row < rows)
    position = start + row
    if CAUSAL:
        end = start + tl.minimum(rows, (tile + 1) * tile_rows)
    else:
        end = start + rows
    size = _split_size(start, splits, margin, LEAST)
    begin = split * size
    end = tl.minimum(end, begin + size)
    if WINDOWED:
        begin = tl.maximum(begin, (start + tile * tile_rows - window + 1) // BLOCK_N * BLOCK_N)
    if begin >= end:
        return

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    query_head = head * GROUP + m % GROUP
    token = first_row.to(tl.int64) + row
    q_at = q_ptr + token[:, None] * stride_qt + query_head[:, None] * stride_qh + d[None, :]
    q = tl.load(q_at, mask=mine[:, None] & (d < D)[None, :], other=0.0)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for block in range(begin, end, BLOCK_N):
        n = block + tl.arange(0, BLOCK_N)
        there = n < end
        at = slot + n
        k = tl.load(
            k_ptr + at[None, :] * stride_kn + head * stride_kh + d[:, None],
            mask=there[None, :] & (d < D)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        seen = there[None, :] & mine[:, None]
        if CAUSAL:
            seen = seen & (n[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that sees nothing yet
        weights = tl.exp(scores - level[:, None])
        fade = tl.exp(top - level)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(
            v_ptr + at[:, None] * stride_vn + head * stride_vh + dv[None, :],
            mask=there[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top

    part = (token * HEADS_Q + query_head) * splits + split
    tl.store(max_ptr + part, top, mask=mine)
    tl.store(sum_ptr + part, total, mask=mine)
    tl.store(acc_ptr + part[:, None] * DV + dv[None, :], acc, mask=mine[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=BOUNDS)
def _merge(
    out_ptr, acc_ptr, max_ptr, sum_ptr, rows_ptr, row_ptr, start_ptr, window, most_rows, tile_rows, splits, margin,
    stride_ot, stride_oh,
    HEADS_Q: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0) // most_rows
    row = tl.program_id(0) % most_rows
    head = tl.program_id(1)
    rows = tl.load(rows_ptr + segment)
    if row >= rows:
        return
    start = tl.load(start_ptr + segment)
    token = tl.load(row_ptr + segment).to(tl.int64) + row
    tile = row // tile_rows
    # the splits that this row's tile has written
    if CAUSAL:
        end = start + tl.minimum(rows, (tile + 1) * tile_rows)
    else:
        end = start + rows
    size = _split_size(start, splits, margin, LEAST)
    low = 0
    if WINDOWED:
        low = tl.maximum((start + tile * tile_rows - window + 1) // BLOCK_N * BLOCK_N, 0) // size
    # all parts at once: their loads wait for memory together
    split = tl.arange(0, MOST_SPLITS)
    dv = tl.arange(0, BLOCK_DV)
    written = (split >= low) & (split < (end + size - 1) // size)
    part = (token * HEADS_Q + head) * splits + split
    top = tl.load(max_ptr + part, mask=written, other=-float("inf"))
    level = tl.max(top, 0)
    gain = tl.exp(top - tl.where(level == -float("inf"), 0.0, level))
    total = tl.sum(tl.load(sum_ptr + part, mask=written, other=0.0) * gain, 0)
    parts = tl.load(acc_ptr + part[:, None] * DV + dv[None, :], mask=written[:, None] & (dv < DV)[None, :], other=0.0)
    result = tl.sum(parts * gain[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    at = out_ptr + token * stride_ot + head * stride_oh + dv
    tl.store(at, result.to(out_ptr.dtype.element_ty), mask=dv < DV)


def attend_table(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: SegmentTable,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> torch.Tensor:
    """See `reference.attend_table`."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    rows_all, heads_q, d = query.shape
    heads_k, dv = keys.shape[1], values.shape[2]
    group = heads_q // heads_k
    # rows beside each other in a tile: all of a round's, a few of a prompt's
    wide = query.dtype == torch.float32  # without tensor cores a tile lives in registers
    rows = max(1, min(table.most_rows, (16 if wide else 64) // group))
    tiles = triton.cdiv(table.most_rows, rows)
    block_m = max(16, triton.next_power_of_2(rows * group))
    block_d, block_dv = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv))
    block_n = 64 if max(block_d, block_dv) <= 128 and not wide else 32
    margin = max(MARGIN, table.most_rows)
    splits = min(MOST_SPLITS, triton.cdiv(table.longest + margin, LEAST_SPLIT))
    segments = len(table.rows)
    out = query.new_zeros(rows_all, heads_q, dv)  # rows of nobody stay finite
    parts = rows_all * heads_q * splits
    acc = query.new_empty(parts * dv, dtype=torch.float32)
    top, total = query.new_empty(parts, dtype=torch.float32), query.new_empty(parts, dtype=torch.float32)
    shared = {
        "HEADS_Q": heads_q, "DV": dv, "BLOCK_DV": block_dv, "BLOCK_N": block_n, "LEAST": LEAST_SPLIT,
        "CAUSAL": causal, "WINDOWED": window is not None,
    }  # fmt: skip
    _attend[(segments * tiles, heads_k, splits)](
        query, keys, values, acc, top, total, table.row, table.rows, table.slot, table.start,
        scale, window or 0, tiles, rows, splits, margin,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        GROUP=group, D=d, BLOCK_D=block_d, BLOCK_M=block_m, num_warps=4, num_stages=2, **shared,
    )  # fmt: skip
    _merge[(segments * table.most_rows, heads_q)](
        out, acc, top, total, table.rows, table.row, table.start, window or 0, table.most_rows, rows, splits, margin,
        out.stride(0), out.stride(1), MOST_SPLITS=triton.next_power_of_2(splits), num_warps=4, **shared,
    )  # fmt: skip
    return out
