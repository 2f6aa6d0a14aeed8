"""Admission on a GPU: one program sorts by counting, a second launch lays out the rows. Contract in reference.py."""

import torch
import triton
import triton.language as tl

from dspark_kernels.admission.reference import Admitted, Packed

FIXED, EARLY_STOP, BUDGET, THRESHOLD = (tl.constexpr(rule) for rule in range(4))


@triton.jit(do_not_specialize=["R", "SPS", "ROWS"])
def _admit(
    confidence_ptr, temperature_ptr, drafting_ptr, active_ptr, rule_ptr, sps_ptr,
    key_ptr, sorted_ptr, length_ptr, first_ptr, survival_ptr,
    R, SPS, ROWS, GAMMA: tl.constexpr, G: tl.constexpr, STREAMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = STREAMS * G
    r = tl.arange(0, STREAMS)
    j = tl.arange(0, G)
    there = (r < R)[:, None] & (j < GAMMA)[None, :]
    at = r[:, None] * GAMMA + j[None, :]
    active = tl.load(active_ptr + r, mask=r < R, other=0) != 0
    drafting = (tl.load(drafting_ptr + r, mask=r < R, other=0) != 0) & active
    logit = tl.load(confidence_ptr + at, mask=there, other=0.0) / tl.load(temperature_ptr + at, mask=there, other=1.0)
    survival = tl.zeros([STREAMS, G], tl.float32)
    running = tl.full([STREAMS], 1.0, tl.float32)
    c = tl.sigmoid(logit)
    for k in tl.static_range(GAMMA):  # the products in the order of the definition
        running = running * tl.sum(tl.where(j[None, :] == k, c, 0.0), 1)
        survival = tl.where(j[None, :] == k, running[:, None], survival)
    survival = tl.where(drafting[:, None] & there, survival, 0.0)
    tl.store(survival_ptr + at, survival, mask=there)

    # survivals are ≥ 0, so their bits sort as they do; below them the tie: j first, then r
    real = drafting[:, None] & there
    tie = j[None, :] * STREAMS + r[:, None]
    bits = survival.to(tl.uint32, bitcast=True).to(tl.int64)
    key = tl.where(real, (bits << 32) | (0x7FFFFFFF - tie).to(tl.int64), -1 - tie.to(tl.int64))
    flat = r[:, None] * G + j[None, :]
    tl.store(key_ptr + flat, key)
    tl.debug_barrier()
    mine = tl.load(key_ptr + tl.arange(0, N))
    rank = tl.zeros([N], tl.int32)
    for start in range(0, N, TILE):
        others = tl.load(key_ptr + start + tl.arange(0, TILE))
        rank += tl.sum((others[None, :] > mine[:, None]).to(tl.int32), 1)
    value = tl.where(mine >= 0, (mine >> 32).to(tl.uint32).to(tl.float32, bitcast=True), 0.0)
    tl.store(sorted_ptr + rank, value)
    tl.debug_barrier()

    n = tl.arange(0, N)
    ordered = tl.load(sorted_ptr + n).to(tl.float64)
    count = tl.sum(active.to(tl.int32), 0)
    streams = tl.sum(drafting.to(tl.int32), 0)
    kind = tl.load(rule_ptr)
    number = tl.load(rule_ptr + 1)
    gained = count.to(tl.float64) + tl.cumsum(ordered, 0)
    behind = tl.minimum(count + n, SPS - 1)
    theta = gained * tl.load(sps_ptr + tl.minimum(behind + 1, SPS - 1)).to(tl.float64)
    before = (gained - ordered) * tl.load(sps_ptr + behind).to(tl.float64)
    stops = (theta <= before) & (kind == EARLY_STOP)
    room = ROWS - count
    most = tl.minimum(room, streams * GAMMA)
    most = tl.where(kind == BUDGET, tl.minimum(most, number), most)
    likely = tl.sum(tl.sum((real & (survival >= number.to(tl.float32, bitcast=True))).to(tl.int32), 1), 0)
    most = tl.where(kind == THRESHOLD, tl.minimum(most, likely), most)
    admitted = tl.minimum(most, tl.min(tl.where(stops, n, N), 0))
    chosen = tl.sum(tl.reshape((rank < admitted).to(tl.int32), [STREAMS, G]), 1)
    fixed = tl.minimum(tl.minimum(number, GAMMA), room // tl.maximum(streams, 1))
    length = tl.where(kind == FIXED, fixed * drafting.to(tl.int32), chosen)
    length = tl.where(active, length, -1)
    tl.store(length_ptr + r, length, mask=r < R)
    tl.store(first_ptr + r, tl.cumsum(length + 1, 0) - (length + 1), mask=r < R)


@triton.jit(do_not_specialize=["R", "ROWS"])
def _pack(
    length_ptr, first_ptr, tokens_ptr, anchor_ptr, position_ptr, slot_ptr,
    out_stream, out_offset, out_ids, out_position, out_slot,
    R, ROWS, GAMMA: tl.constexpr, STREAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, STREAMS)
    first = tl.load(first_ptr + r, mask=r < R, other=0)
    length = tl.load(length_ptr + r, mask=r < R, other=-1)
    own = (row[:, None] >= first[None, :]) & (row[:, None] <= (first + length)[None, :])
    stream = tl.max(tl.where(own, r[None, :], -1), 1)
    real = stream >= 0
    safe = tl.maximum(stream, 0)
    offset = tl.where(real, row - tl.load(first_ptr + safe), 0)
    token = tl.load(anchor_ptr + safe)
    drafted = tl.load(tokens_ptr + safe * GAMMA + offset - 1, mask=real & (offset > 0), other=0)
    position = tl.where(real, tl.load(position_ptr + safe) + offset, 0)
    there = row < ROWS
    tl.store(out_stream + row, stream.to(tl.int64), mask=there)
    tl.store(out_offset + row, offset.to(tl.int64), mask=there)
    tl.store(out_ids + row, tl.where(real, tl.where(offset > 0, drafted, token), 0).to(tl.int64), mask=there)
    tl.store(out_position + row, position, mask=there)
    tl.store(out_slot + row, tl.where(real, tl.load(slot_ptr + safe) + position, -1), mask=there)


def admit(
    confidence: torch.Tensor,
    temperature: torch.Tensor,
    drafting: torch.Tensor,
    active: torch.Tensor,
    rule: torch.Tensor,
    sps: torch.Tensor,
    rows: int,
) -> Admitted:
    """See `reference.admit`."""
    streams, gamma = confidence.shape
    device = confidence.device
    blocks, g = triton.next_power_of_2(streams), max(1, triton.next_power_of_2(gamma))
    length = torch.empty(streams, dtype=torch.int32, device=device)
    first = torch.empty(streams, dtype=torch.int32, device=device)
    survival = torch.empty(streams, gamma, dtype=torch.float32, device=device)
    key = torch.empty(blocks * g, dtype=torch.int64, device=device)
    ordered = torch.empty(blocks * g, dtype=torch.float32, device=device)
    _admit[(1,)](
        confidence, temperature, drafting, active, rule, sps, key, ordered, length, first, survival,
        streams, len(sps), rows, GAMMA=gamma, G=g, STREAMS=blocks, TILE=min(32, blocks * g), num_warps=8,
    )  # fmt: skip
    return Admitted(length, first, survival)


def pack(
    admitted: Admitted,
    tokens: torch.Tensor,
    anchor: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    rows: int,
) -> Packed:
    """See `reference.pack`."""
    streams, gamma = tokens.shape
    packed = Packed(*(torch.empty(rows, dtype=torch.int64, device=tokens.device) for _ in range(5)))
    block = 32
    _pack[(triton.cdiv(rows, block),)](
        admitted.length, admitted.first, tokens, anchor, position, slot, *packed,
        streams, rows, GAMMA=gamma, STREAMS=triton.next_power_of_2(streams), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return packed
