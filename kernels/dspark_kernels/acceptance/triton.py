"""Acceptance on a GPU, in five launches over whatever the batch is; contract in reference.py.

`_cut` finds truncation thresholds and returns at once for streams without one. `_scan` goes over the logits once:
online softmax, argmax, and the race with noise made on the spot. `_judge` puts the parts together and decides; to judge
blocks by rejection it looks up what their slots' candidates have, side by side. `_weigh` and `_pick` draw the bonus
token of streams that verify by rejection; only the row that ends their round is weighed.
"""

import torch
import triton
import triton.language as tl

from dspark_kernels.acceptance.reference import Accepted
from dspark_kernels.noise.triton import ROUND, race_noise_from, uniforms
from dspark_kernels.streams import Drafts, Sampling

CHUNK, BLOCK = 4096, 1024
"""Entries of the vocabulary that one program scans, and that it holds at a time."""

GREEDY, REJECTION, COUPLED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def order_key(x):
    """float32 as uint32 that sorts alike."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def key_value(key):
    """The float32 of an `order_key` key."""
    bits = tl.where((key >> 31) == 1, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _logit_key(x, TOP: tl.constexpr):
    """Logits of 16 or 32 bits as uint32 that sort alike; TOP is their sign's bit."""
    if TOP == 0x8000:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits & TOP) != 0, bits ^ (TOP * 2 - 1), bits | TOP)


@triton.jit
def _key_logit(key, KIND: tl.constexpr, TOP: tl.constexpr):
    """The logit of a `_logit_key` key, as float32."""
    bits = tl.where((key & TOP) != 0, key ^ TOP, key ^ (TOP * 2 - 1))
    if TOP == 0x8000:
        return bits.to(tl.uint16).to(KIND, bitcast=True).to(tl.float32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _cut(
    logits_ptr, stride_row, cut_ptr, first_ptr, length_ptr, mode_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    V, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0) // ROWS
    j = tl.program_id(0) % ROWS
    if j > tl.load(length_ptr + stream):
        return
    cut_at = cut_ptr + tl.program_id(0)
    top_k = tl.load(top_k_ptr + stream)
    top_p = tl.load(top_p_ptr + stream)
    min_p = tl.load(min_p_ptr + stream)
    plain = ((top_k <= 0) | (top_k >= V)) & (top_p >= 1.0) & (min_p <= 0.0)
    if plain | (tl.load(mode_ptr + stream) == GREEDY):
        tl.store(cut_at, -float("inf"))
        return
    # thresholds are sought among the logits as they are: dividing by the temperature does not change their order
    temperature = tl.load(temperature_ptr + stream)
    kind: tl.constexpr = logits_ptr.dtype.element_ty
    row = logits_ptr + (tl.load(first_ptr + stream) + j).to(tl.int64) * stride_row
    v = tl.arange(0, BLOCK)
    largest = tl.full([], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(largest, tl.max(x, 0))

    least = tl.full([], 0, tl.uint32)  # the key of the threshold so far: everything passes
    if (top_k > 0) & (top_k < V):  # the largest key that at least top_k entries reach, bit by bit
        bit = tl.full([], TOP, tl.uint32)
        for _ in range(BITS):
            trial = least | bit
            bit = bit >> 1
            count = tl.full([], 0, tl.int32)
            for start in range(0, V, BLOCK):
                there = start + v < V
                key = _logit_key(tl.load(row + start + v, mask=there, other=-float("inf")), TOP)
                count += tl.sum(((key >= trial) & there).to(tl.int32), 0)
            least = tl.where(count >= top_k, trial, least)
    if top_p < 1.0:  # the largest key above which there is less than top_p of what is left
        shrink = tl.math.div_rn(1.0, temperature)
        total = tl.full([], 0.0, tl.float32)
        for start in range(0, V, BLOCK):
            there = start + v < V
            x = tl.load(row + start + v, mask=there, other=-float("inf"))
            mass = tl.exp((x.to(tl.float32) - largest) * shrink)
            total += tl.sum(tl.where(there & (_logit_key(x, TOP) >= least), mass, 0.0), 0)
        nucleus = tl.full([], 0, tl.uint32)
        bit = tl.full([], TOP, tl.uint32)
        for _ in range(BITS):
            trial = nucleus | bit
            bit = bit >> 1
            above = tl.full([], 0.0, tl.float32)
            for start in range(0, V, BLOCK):
                there = start + v < V
                x = tl.load(row + start + v, mask=there, other=-float("inf"))
                mass = tl.exp((x.to(tl.float32) - largest) * shrink)
                above += tl.sum(tl.where(there & (_logit_key(x, TOP) >= tl.maximum(least, trial)), mass, 0.0), 0)
            nucleus = tl.where(above >= top_p * total, trial, nucleus)
        least = tl.maximum(least, nucleus)
    threshold = tl.where(least == 0, -float("inf"), tl.math.div_rn(_key_logit(least, kind, TOP), temperature))
    if min_p > 0.0:
        threshold = tl.maximum(threshold, tl.math.div_rn(largest, temperature) + tl.log(min_p))
    tl.store(cut_at, threshold)


@triton.jit
def _scan(
    logits_ptr, stride_row, cut_ptr, first_ptr, length_ptr, mode_ptr, temperature_ptr, seed_ptr, position_ptr,
    best_ptr, token_ptr, top_ptr, sum_ptr,
    V, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0) // ROWS
    j = tl.program_id(0) % ROWS
    chunk = tl.program_id(1)
    if j > tl.load(length_ptr + stream):
        return
    mode = tl.load(mode_ptr + stream)
    row = logits_ptr + (tl.load(first_ptr + stream) + j).to(tl.int64) * stride_row
    temperature = tl.where(mode == GREEDY, 1.0, tl.load(temperature_ptr + stream))
    cut = tl.load(cut_ptr + tl.program_id(0))
    seed = tl.load(seed_ptr + stream)
    position = tl.load(position_ptr + stream) + 1 + j
    best = tl.full([], -float("inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, V), BLOCK):
        v = start + tl.arange(0, BLOCK)
        raw = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
        raw = tl.where(raw >= -float("inf"), raw, float("inf"))  # one that is no number leaves the row without a token
        x = tl.math.div_rn(raw, temperature)
        x = tl.where((v < V) & ((x >= cut) | (x == float("inf"))), x, -float("inf"))
        if mode == REJECTION:
            new_top = tl.maximum(top, tl.max(x, 0))
            level = tl.where(new_top == -float("inf"), 0.0, new_top)
            total = total * tl.exp(top - level) + tl.sum(tl.exp(x - level), 0)
            top = new_top
        else:
            if mode == COUPLED:
                x = x + race_noise_from(seed, position, start, BLOCK)
            else:
                x = raw
            here, at = tl.max(x, 0, return_indices=True)  # the lowest of equal ones
            token = tl.where(here > best, start + at, token)
            best = tl.maximum(best, here)
    part = tl.program_id(0) * CHUNKS + chunk
    tl.store(best_ptr + part, best)
    tl.store(token_ptr + part, token)
    tl.store(top_ptr + part, top)
    tl.store(sum_ptr + part, total)


@triton.jit
def _judge(
    logits_ptr, stride_row, cut_ptr, first_ptr, length_ptr, mode_ptr, temperature_ptr, round_key_ptr, position_ptr,
    tokens_ptr, stride_tokens, q_x_ptr, stride_q_x, candidates_ptr, stride_cr, stride_ck, q_ptr, stride_qr, stride_qk,
    best_ptr, token_ptr, top_ptr, sum_ptr, accepted_ptr, bonus_ptr, level_ptr, mass_ptr, share_ptr,
    C, GAMMA: tl.constexpr, ROWS_P2: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0)
    length = tl.load(length_ptr + stream)
    if length < 0:
        tl.store(accepted_ptr + stream, -1)
        tl.store(bonus_ptr + stream, 0)
        return
    mode = tl.load(mode_ptr + stream)
    j = tl.arange(0, ROWS_P2)
    c = tl.arange(0, CHUNKS_P2)
    mine = j <= length
    part = (stream * (GAMMA + 1) + j)[:, None] * CHUNKS + c[None, :]
    there = mine[:, None] & (c < CHUNKS)[None, :]
    drafted = j < length
    x = tl.load(tokens_ptr + stream * stride_tokens + j, mask=drafted, other=-1)
    if mode == REJECTION:
        tops = tl.load(top_ptr + part, mask=there, other=-float("inf"))
        level = tl.max(tops, 1)
        # a row that has no token: nothing can follow it
        length = tl.min(tl.where(mine & ~((level > -float("inf")) & (level < float("inf"))), j, length), 0)
        mine = j <= length
        drafted = j < length
        level = tl.where(mine, level, 0.0)
        mass = tl.sum(tl.load(sum_ptr + part, mask=there, other=0.0) * tl.exp(tops - level[:, None]), 1)
        temperature = tl.load(temperature_ptr + stream)
        row = (tl.load(first_ptr + stream) + j).to(tl.int64)
        at_x = tl.load(logits_ptr + row * stride_row + x, mask=drafted, other=-float("inf")).to(tl.float32)
        at_x = tl.math.div_rn(at_x, temperature)
        cut = tl.load(cut_ptr + stream * (GAMMA + 1) + j, mask=mine, other=0.0)
        p_x = tl.where(drafted & (at_x >= cut), tl.math.div_rn(tl.exp(at_x - level), tl.where(mine, mass, 1.0)), 0.0)
        q_x = tl.load(q_x_ptr + stream * stride_q_x + j, mask=drafted, other=1.0)
        # w_j, how likely at least x_1 … x_j stand given that drafts
        ratio = p_x.to(tl.float64) / q_x.to(tl.float64)
        share = tl.full([ROWS_P2], 1.0, tl.float64)
        w = tl.sum(tl.where(j == 0, share, 0.0), 0)
        for k in range(GAMMA):
            w = w * tl.sum(tl.where(j == k, ratio, 0.0), 0)
            w = tl.minimum(w, 1.0, propagate_nan=tl.PropagateNan.ALL)  # NaN refuses
            share = tl.where(j == k + 1, w, share)
        # s_j, how likely a longer prefix stands: of slot j's candidates what is covered by both
        longer = tl.zeros([ROWS_P2], tl.float32)
        for start in range(0, C, BLOCK_C):
            i = start + tl.arange(0, BLOCK_C)
            slot = drafted[:, None] & (i < C)[None, :]
            candidates = candidates_ptr + stream * stride_cr + j[:, None] * stride_ck + i[None, :]
            at = tl.load(candidates, mask=slot, other=0)
            y = tl.load(logits_ptr + row[:, None] * stride_row + at, mask=slot, other=-float("inf")).to(tl.float32)
            y = tl.math.div_rn(y, temperature)
            p = tl.math.div_rn(tl.exp(y - level[:, None]), tl.where(mine, mass, 1.0)[:, None])
            p = tl.where(slot & (y >= cut[:, None]), p, 0.0)
            q = tl.load(q_ptr + stream * stride_qr + j[:, None] * stride_qk + i[None, :], mask=slot, other=0.0)
            longer += tl.sum(tl.minimum(share.to(tl.float32)[:, None] * p, q), 1)
        missing = share - longer.to(tl.float64)
        key = tl.load(round_key_ptr + stream)
        position = tl.load(position_ptr + stream)
        u = uniforms(key, position, ROUND, (GAMMA + j).to(tl.int64))  # of x_j
        stands = tl.where(j == length, u < share, u * (missing + 1.0 - share) < missing) & (j > 0) & mine
        accepted = tl.max(tl.where(stands, j, 0), 0)
        ends = (j == accepted) & mine
        tl.store(level_ptr + stream, tl.sum(tl.where(ends, level, 0.0), 0))
        tl.store(mass_ptr + stream, tl.sum(tl.where(ends, mass, 0.0), 0))
        tl.store(share_ptr + stream, tl.sum(tl.where(ends, share, 0.0), 0).to(tl.float32))
    else:
        best = tl.load(best_ptr + part, mask=there, other=-float("inf"))
        tokens = tl.load(token_ptr + part, mask=there, other=0)
        largest = tl.max(best, 1)
        # chunks are in the order of the vocabulary: the lowest token among equals
        own = tl.min(tl.where((best == largest[:, None]) & there, tokens, 0x7FFFFFFF), 1)
        own = tl.where((largest > -float("inf")) & (largest < float("inf")), own, -1)  # or the row has no token
        stands = drafted & (own == x)
        accepted = tl.min(tl.where(stands, ROWS_P2, j), 0)
        tl.store(bonus_ptr + stream, tl.sum(tl.where((j == accepted) & mine, own, 0), 0))
    tl.store(accepted_ptr + stream, accepted)


@triton.jit
def _weigh(
    logits_ptr, stride_row, cut_ptr, first_ptr, length_ptr, mode_ptr, temperature_ptr,
    candidates_ptr, stride_cr, stride_ck, q_ptr, stride_qr, stride_qk,
    accepted_ptr, level_ptr, mass_ptr, share_ptr, weight_ptr, sums_ptr,
    V, C, GAMMA: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0)
    chunk = tl.program_id(1)
    length = tl.load(length_ptr + stream)
    if (length < 0) | (tl.load(mode_ptr + stream) != REJECTION):
        return
    accepted = tl.load(accepted_ptr + stream)
    row = (tl.load(first_ptr + stream) + accepted).to(tl.int64)
    temperature = tl.load(temperature_ptr + stream)
    cut = tl.load(cut_ptr + stream * (GAMMA + 1) + accepted)
    level = tl.load(level_ptr + stream)
    mass = tl.load(mass_ptr + stream)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride_row + v, mask=v < V, other=-float("inf")).to(tl.float32)
    x = tl.math.div_rn(x, temperature)
    p = tl.where((v < V) & (x >= cut), tl.exp(x - level) / mass, 0.0)
    out = weight_ptr + stream.to(tl.int64) * V
    share = tl.where(accepted < length, tl.load(share_ptr + stream), 1.0)
    tl.store(out + v, share * p, mask=v < V)
    tl.store(sums_ptr + (stream * CHUNKS + chunk) * 2 + 1, tl.sum(p.to(tl.float64), 0))
    if accepted < length:  # of the target's share, the drafter's is taken off where this chunk has candidates
        tl.debug_barrier()
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            token = tl.load(candidates_ptr + stream * stride_cr + accepted * stride_ck + c, mask=c < C, other=-1)
            here = (token >= chunk * BLOCK) & (token < (chunk + 1) * BLOCK)
            q = tl.load(q_ptr + stream * stride_qr + accepted * stride_qk + c, mask=here, other=0.0)
            own = tl.load(out + token, mask=here, other=0.0)
            tl.store(out + token, tl.maximum(own - q, 0.0), mask=here)
        tl.debug_barrier()
        p = tl.load(out + v, mask=v < V, other=0.0)
    tl.store(sums_ptr + (stream * CHUNKS + chunk) * 2, tl.sum(p.to(tl.float64), 0))


@triton.jit
def _pick(
    logits_ptr, stride_row, cut_ptr, first_ptr, length_ptr, mode_ptr, temperature_ptr, round_key_ptr, position_ptr,
    accepted_ptr, level_ptr, mass_ptr, weight_ptr, sums_ptr, bonus_ptr,
    V, GAMMA: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0)
    if (tl.load(length_ptr + stream) < 0) | (tl.load(mode_ptr + stream) != REJECTION):
        return
    c = tl.arange(0, CHUNKS_P2)
    rest = tl.load(sums_ptr + (stream * CHUNKS + c) * 2, mask=c < CHUNKS, other=0.0)
    whole = tl.load(sums_ptr + (stream * CHUNKS + c) * 2 + 1, mask=c < CHUNKS, other=0.0)
    # nothing is left but rounding: this had probability zero, and any draw from p is right
    from_rest = tl.sum(rest, 0) > 0.0
    sums = tl.where(from_rest, rest, whole)
    reach = tl.cumsum(sums, 0)
    u = uniforms(tl.load(round_key_ptr + stream), tl.load(position_ptr + stream), ROUND, tl.full([1], 0, tl.int64))
    goal = tl.sum(u, 0) * tl.sum(tl.where(c == CHUNKS - 1, reach, 0.0), 0)
    # the first chunk, and in it the first token, whose cdf lies above; never one of weight 0
    chunk = tl.min(tl.where((reach > goal) & (sums > 0.0), c, CHUNKS_P2), 0)
    chunk = tl.minimum(chunk, tl.max(tl.where(sums > 0.0, c, 0), 0))
    before = tl.sum(tl.where(c < chunk, sums, 0.0), 0)

    accepted = tl.load(accepted_ptr + stream)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + stream.to(tl.int64) * V + v, mask=v < V, other=0.0)
    if from_rest == 0:
        row = (tl.load(first_ptr + stream) + accepted).to(tl.int64)
        x = tl.load(logits_ptr + row * stride_row + v, mask=v < V, other=-float("inf")).to(tl.float32)
        x = tl.math.div_rn(x, tl.load(temperature_ptr + stream))
        cut = tl.load(cut_ptr + stream * (GAMMA + 1) + accepted)
        level = tl.load(level_ptr + stream)
        weight = tl.where((v < V) & (x >= cut), tl.exp(x - level) / tl.load(mass_ptr + stream), 0.0)
    reach_in = before + tl.cumsum(weight.to(tl.float64), 0)
    token = tl.min(tl.where((reach_in > goal) & (weight > 0.0), v, 0x7FFFFFFF), 0)
    last = tl.max(tl.where(weight > 0.0, v, -1), 0)  # the row has no token where nothing weighs
    tl.store(bonus_ptr + stream, tl.minimum(token, last))


def accept(
    logits: torch.Tensor, first: torch.Tensor, length: torch.Tensor, drafts: Drafts, sampling: Sampling
) -> Accepted:
    """See `reference.accept`."""
    streams, gamma = drafts.tokens.shape
    vocab, rows = logits.shape[1], gamma + 1
    device = logits.device
    chunks, blocks = triton.cdiv(vocab, CHUNK), triton.cdiv(vocab, BLOCK)
    cut = torch.empty(streams * rows, dtype=torch.float32, device=device)
    part = [torch.empty(streams * rows * chunks, dtype=torch.float32, device=device) for _ in range(3)]
    token = torch.empty(streams * rows * chunks, dtype=torch.int32, device=device)
    accepted = torch.empty(streams, dtype=torch.int32, device=device)
    bonus = torch.empty(streams, dtype=torch.int32, device=device)
    level = torch.empty(streams, dtype=torch.float32, device=device)
    mass = torch.empty(streams, dtype=torch.float32, device=device)
    share = torch.empty(streams, dtype=torch.float32, device=device)
    weight = torch.empty(streams * vocab, dtype=torch.float32, device=device)
    sums = torch.empty(streams * blocks * 2, dtype=torch.float64, device=device)
    s, rowwise = sampling, (logits, logits.stride(0), cut, first, length, sampling.mode, sampling.temperature)
    bits = logits.element_size() * 8
    _cut[(streams * rows,)](
        *rowwise, s.top_k, s.top_p, s.min_p, vocab, ROWS=rows, BLOCK=CHUNK, TOP=1 << (bits - 1), BITS=bits, num_warps=16
    )
    _scan[(streams * rows, chunks)](
        *rowwise, s.seed, s.position, part[0], token, part[1], part[2],
        vocab, ROWS=rows, CHUNKS=chunks, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    candidates, q = drafts.candidates, drafts.q
    spread = (candidates, candidates.stride(0), candidates.stride(1), q, q.stride(0), q.stride(1))
    _judge[(streams,)](
        *rowwise, s.round_key, s.position, drafts.tokens, drafts.tokens.stride(0), drafts.q_x, drafts.q_x.stride(0),
        *spread, part[0], token, part[1], part[2], accepted, bonus, level, mass, share,
        candidates.shape[2], GAMMA=gamma, ROWS_P2=triton.next_power_of_2(rows), CHUNKS=chunks,
        CHUNKS_P2=triton.next_power_of_2(chunks), BLOCK_C=min(128, triton.next_power_of_2(candidates.shape[2])),
        num_warps=4,
    )  # fmt: skip
    _weigh[(streams, blocks)](
        *rowwise, *spread, accepted, level, mass, share, weight, sums,
        vocab, candidates.shape[2], GAMMA=gamma, CHUNKS=blocks, BLOCK=BLOCK,
        BLOCK_C=min(1024, triton.next_power_of_2(candidates.shape[2])), num_warps=4,
    )  # fmt: skip
    _pick[(streams,)](
        *rowwise, s.round_key, s.position, accepted, level, mass, weight, sums, bonus,
        vocab, GAMMA=gamma, CHUNKS=blocks, CHUNKS_P2=triton.next_power_of_2(blocks), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return Accepted(accepted, bonus)
