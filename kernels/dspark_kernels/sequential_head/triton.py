"""The walk over candidates on a GPU: all γ steps of every stream in one launch, a program a stream.

Contract in reference.py. Vectors that a later step needs whole go through a little memory of the stream's own, which
stays in the nearest cache; a barrier of the program stands between writing and reading.
"""

import torch
import triton
import triton.language as tl

from dspark_kernels.acceptance.triton import COUPLED, GREEDY, REJECTION, key_value, order_key
from dspark_kernels.noise.triton import ROUND, race_noise_at, uniforms
from dspark_kernels.sequential_head.reference import HeadWeights, Prepared, Walk
from dspark_kernels.streams import Drafts, Sampling

NONE, VANILLA, GATED, RNN = (tl.constexpr(i) for i in range(4))
KINDS = {"none": 0, "vanilla": 1, "gated": 2, "rnn": 3}


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _cut_of(x, there, top_k, top_p, min_p, C):
    """The least of ``x`` [n] that top-k, top-p and min-p leave."""
    key = order_key(x)
    largest = tl.max(tl.where(there, x, -float("inf")), 0)
    least = tl.full([], 0, tl.uint32)
    if (top_k > 0) & (top_k < C):
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            trial = least | bit
            bit = bit >> 1
            count = tl.sum(((key >= trial) & there).to(tl.int32), 0)
            least = tl.where(count >= top_k, trial, least)
    if top_p < 1.0:
        mass = tl.where(there & (key >= least), tl.exp(x - largest), 0.0)
        goal = top_p * tl.sum(mass, 0)
        nucleus = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            trial = nucleus | bit
            bit = bit >> 1
            nucleus = tl.where(tl.sum(tl.where(key >= trial, mass, 0.0), 0) >= goal, trial, nucleus)
        least = tl.maximum(least, nucleus)
    cut = tl.where(least == 0, -float("inf"), key_value(least))
    return tl.where(min_p > 0.0, tl.maximum(cut, largest + tl.log(tl.maximum(min_p, 1e-38))), cut)


@triton.jit
def _walk(
    index_ptr, ids_ptr, base_ptr, floor_ptr, inner_hidden_ptr, confidence_ptr,
    w1_ptr, w2_ptr, inner_ptr, confidence_e_ptr, longest_ptr, anchor_ptr,
    mode_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, round_key_ptr, position_ptr,
    scratch_ptr, tokens_ptr, q_ptr, q_x_ptr, logit_ptr, proved_ptr,
    KIND: tl.constexpr, CONFIDENCE: tl.constexpr, CONFIDENCE_E: tl.constexpr,
    GAMMA: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, TILE_C: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0)
    mode = tl.load(mode_ptr + stream)
    temperature = tl.where(mode == GREEDY, 1.0, tl.load(temperature_ptr + stream))
    top_k = tl.load(top_k_ptr + stream)
    top_p = tl.load(top_p_ptr + stream)
    min_p = tl.load(min_p_ptr + stream)
    position = tl.load(position_ptr + stream)
    previous = tl.load(anchor_ptr + stream).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    there = c < C
    r = tl.arange(0, BLOCK_R)
    real = r < RANK
    scores_ptr = scratch_ptr + stream * (BLOCK_C + 3 * BLOCK_R)
    features_ptr = scores_ptr + BLOCK_C
    states_ptr = features_ptr + BLOCK_R  # two of them: one is read while the other is written
    if KIND == RNN:
        tl.store(states_ptr + r, tl.zeros([BLOCK_R], tl.float32))
        tl.debug_barrier()

    for k in range(GAMMA):
        slot = stream * GAMMA + k
        score = tl.load(base_ptr + slot * C + c, mask=there, other=-float("inf"))
        reach = tl.load(floor_ptr + slot)
        if KIND != NONE:
            e = tl.load(w1_ptr + previous * RANK + r, mask=real, other=0.0).to(tl.float32)
        if CONFIDENCE:
            logit = tl.load(confidence_ptr + slot)
            if CONFIDENCE_E:
                logit += tl.sum(e * tl.load(confidence_e_ptr + r, mask=real, other=0.0).to(tl.float32), 0)
            tl.store(logit_ptr + slot, logit)
        if KIND != NONE:
            features = e
            if KIND == GATED:
                for o in range(0, RANK, TILE_R):
                    out = o + tl.arange(0, TILE_R)
                    tile = (out < RANK)[:, None] & real[None, :]
                    w = tl.load(inner_ptr + out[:, None] * RANK + r[None, :], mask=tile, other=0.0).to(tl.float32)
                    gate = tl.load(inner_hidden_ptr + slot * RANK + out, mask=out < RANK, other=0.0)
                    gate += tl.sum(w * e[None, :], 1)
                    own = tl.load(w1_ptr + previous * RANK + out, mask=out < RANK, other=0.0).to(tl.float32)
                    tl.store(features_ptr + out, tl.sigmoid(gate) * own, mask=out < RANK)
                tl.debug_barrier()
                features = tl.load(features_ptr + r, mask=real, other=0.0)
            if KIND == RNN:
                old_ptr = states_ptr + (k % 2) * BLOCK_R
                new_ptr = states_ptr + ((k + 1) % 2) * BLOCK_R
                state = tl.load(old_ptr + r, mask=real, other=0.0)
                for o in range(0, RANK, TILE_R):
                    out = o + tl.arange(0, TILE_R)
                    tile = (out < RANK)[:, None] & real[None, :]
                    at = inner_ptr + out[:, None] * (2 * RANK) + r[None, :]
                    hidden = inner_hidden_ptr + slot * (3 * RANK) + out
                    part = RANK * 2 * RANK
                    gate = tl.load(hidden, mask=out < RANK, other=0.0)
                    gate += tl.sum(tl.load(at, mask=tile, other=0.0).to(tl.float32) * state[None, :], 1)
                    gate += tl.sum(tl.load(at + RANK, mask=tile, other=0.0).to(tl.float32) * e[None, :], 1)
                    at += part
                    new = tl.load(hidden + RANK, mask=out < RANK, other=0.0)
                    new += tl.sum(tl.load(at, mask=tile, other=0.0).to(tl.float32) * state[None, :], 1)
                    new += tl.sum(tl.load(at + RANK, mask=tile, other=0.0).to(tl.float32) * e[None, :], 1)
                    at += part
                    result = tl.load(hidden + 2 * RANK, mask=out < RANK, other=0.0)
                    result += tl.sum(tl.load(at, mask=tile, other=0.0).to(tl.float32) * state[None, :], 1)
                    result += tl.sum(tl.load(at + RANK, mask=tile, other=0.0).to(tl.float32) * e[None, :], 1)
                    keep = tl.sigmoid(gate)
                    own = tl.load(old_ptr + out, mask=out < RANK, other=0.0)
                    tl.store(new_ptr + out, keep * own + (1.0 - keep) * _tanh(new), mask=out < RANK)
                    tl.store(features_ptr + out, _tanh(result), mask=out < RANK)
                tl.debug_barrier()
                features = tl.load(features_ptr + r, mask=real, other=0.0)
            for first in range(0, C, TILE_C):
                t = first + tl.arange(0, TILE_C)
                row = tl.load(index_ptr + slot * C + t, mask=t < C, other=0).to(tl.int64)
                w = tl.load(w2_ptr + row[:, None] * RANK + r[None, :], mask=(t < C)[:, None] & real[None, :], other=0.0)
                tl.store(scores_ptr + t, tl.sum(w.to(tl.float32) * features[None, :], 1), mask=t < C)
            tl.debug_barrier()
            score += tl.load(scores_ptr + c, mask=there, other=0.0)
            reach += tl.load(longest_ptr) * tl.sqrt(tl.sum(features * features, 0))
        best = tl.max(score, 0)
        tl.store(proved_ptr + slot, (best > reach).to(tl.int8))

        ids = tl.load(ids_ptr + slot * C + c, mask=there, other=0).to(tl.int64)
        x = tl.math.div_rn(score, temperature)
        if mode != GREEDY:
            if ((top_k > 0) & (top_k < C)) | (top_p < 1.0) | (min_p > 0.0):
                x = tl.where(x >= _cut_of(x, there, top_k, top_p, min_p, C), x, -float("inf"))
        q = tl.exp(x - tl.max(x, 0))
        q = q / tl.sum(q, 0)
        place = tl.min(tl.where(score == best, c, BLOCK_C), 0)
        if mode == REJECTION:
            cdf = tl.cumsum(q.to(tl.float64), 0)
            word = tl.full([1], 0, tl.int64) + 1 + k
            u = tl.sum(uniforms(tl.load(round_key_ptr + stream), position, ROUND, word), 0)
            goal = u * tl.max(cdf, 0)
            place = tl.min(tl.where((cdf > goal) & (q > 0.0), c, BLOCK_C), 0)
            place = tl.minimum(place, tl.max(tl.where(q > 0.0, c, 0), 0))
        if mode == COUPLED:
            race = x + race_noise_at(tl.load(seed_ptr + stream), position + 1 + k, ids)
            place = tl.min(tl.where(there & (race == tl.max(tl.where(there, race, -float("inf")), 0)), c, BLOCK_C), 0)
        chosen = c == place
        previous = tl.sum(tl.where(chosen, ids, 0), 0)
        tl.store(tokens_ptr + slot, previous.to(tl.int32))
        tl.store(q_ptr + slot * C + c, q, mask=there)
        tl.store(q_x_ptr + slot, tl.sum(tl.where(chosen, q, 0.0), 0))
        tl.debug_barrier()  # the next step writes over what this one still reads


def walk(prepared: Prepared, anchor: torch.Tensor, weights: HeadWeights, sampling: Sampling) -> Walk:
    """See `reference.walk`."""
    streams, gamma, c = prepared.ids.shape
    device = anchor.device
    rank = 1 if weights.w1 is None else weights.w1.shape[1]
    block_c, block_r = triton.next_power_of_2(c), max(16, triton.next_power_of_2(rank))
    real = [torch.empty(streams, gamma, dtype=torch.float32, device=device) for _ in range(2)]
    tokens = torch.empty(streams, gamma, dtype=torch.int32, device=device)
    q = torch.empty(streams, gamma, c, dtype=torch.float32, device=device)
    proved = torch.empty(streams, gamma, dtype=torch.int8, device=device)
    scratch = torch.empty(streams * (block_c + 3 * block_r), dtype=torch.float32, device=device)
    nothing = scratch  # a pointer for what this kind of head does not have
    wide = block_c >= 512  # more rows of W2 on their way at once: one program reads them all
    s = sampling
    _walk[(streams,)](
        prepared.rows, prepared.ids, prepared.base, prepared.floor,
        nothing if prepared.inner is None else prepared.inner,
        nothing if prepared.confidence is None else prepared.confidence,
        nothing if weights.w1 is None else weights.w1, nothing if weights.w2 is None else weights.w2,
        nothing if weights.inner is None else weights.inner,
        nothing if weights.confidence_e is None else weights.confidence_e,
        weights.longest_row, anchor,
        s.mode, s.temperature, s.top_k, s.top_p, s.min_p, s.seed, s.round_key, s.position,
        scratch, tokens, q, real[0], real[1], proved,
        KIND=KINDS[weights.kind], CONFIDENCE=prepared.confidence is not None,
        CONFIDENCE_E=weights.confidence_e is not None and weights.w1 is not None,
        GAMMA=gamma, C=c, BLOCK_C=block_c, TILE_C=min(128 if wide else 64, block_c), RANK=rank, BLOCK_R=block_r,
        TILE_R=min(32, block_r), num_warps=16 if wide else 8,
    )  # fmt: skip
    drafts = Drafts(tokens, prepared.ids, q, real[0])
    return Walk(drafts, None if prepared.confidence is None else real[1], proved.bool())
