"""The contract of admission, in plain torch: verification lengths chosen and packed without asking the host.

Four rules (`decoding/schedule.py`), a number each in ``rule``:
FIXED: ``n`` draft tokens of every stream. EARLY_STOP: Algorithm 1, admissions by falling survival, ties by j then r,
until one does not raise Θ = τ·SPS(B). BUDGET: the ``n`` best prefixes, the paper's production variant; ``n`` must come
from the past, as the host chooses it. THRESHOLD: draft tokens whose survival is at least the number, a float32 whose
bits ``rule`` holds. No rule admits more than the rows that the pass has: FIXED then takes less of every stream, the
others the best prefixes.

Symbols: R streams (rows of nobody included), γ block size, B rows of the target pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FIXED, EARLY_STOP, BUDGET, THRESHOLD = 0, 1, 2, 3


class Admitted(NamedTuple):
    """What of each stream goes to the target."""

    length: Tensor
    """ℓ, [R] int32; -1 for rows of nobody."""
    first: Tensor
    """First row of each stream in the pass, [R] int32."""
    survival: Tensor
    """a_k = c_1·…·c_k, [R, γ] float32; 0 for streams that do not draft."""


class Packed(NamedTuple):
    """The rows of a target pass, [B] each; rows of nobody are token 0 at position 0 of no stream."""

    stream: Tensor
    """int64; -1 for rows of nobody."""
    offset: Tensor
    """int64: 0 is the anchor's row, j the row of x_j."""
    ids: Tensor
    """int64 token ids."""
    position: Tensor
    """int64."""
    slot: Tensor
    """int64 slots of a KV store; -1 for rows of nobody."""


def admit(
    confidence: Tensor,  # [R, γ] float32: logits
    temperature: Tensor,  # [R, γ] float32: of the calibration, each stream's own kind
    drafting: Tensor,  # [R] bool
    active: Tensor,  # [R] bool
    rule: Tensor,  # [2] int32: which rule, and its number (THRESHOLD: its bits)
    sps: Tensor,  # [≥ B + 1] float32: rounds a second with b rows
    rows: int,
) -> Admitted:
    """ℓ for each stream; active streams have their anchor's row whatever happens, so R active ≤ ``rows``."""
    streams, gamma = confidence.shape
    drafting = drafting & active
    survival = torch.sigmoid(confidence / temperature).cumprod(1) * drafting.unsqueeze(1)
    if gamma == 0:
        length = active.int() - 1
        return Admitted(length, (length + 1).cumsum(0).int() - (length + 1), survival)
    count = active.sum()
    a = survival.T.flatten()  # ties: j before r, in the order of a stable sort
    real = drafting.expand(gamma, streams).flatten()
    order = torch.where(real, a, -1.0).sort(stable=True, descending=True)
    n = torch.arange(len(a), device=a.device)
    gained = count + order.values.double().cumsum(0)
    at = (count + n).clamp_max(len(sps) - 1)
    theta = gained * sps[(at + 1).clamp_max(len(sps) - 1)]
    before = (gained - order.values.double()) * sps[at]
    stops = (theta <= before) & (rule[0] == EARLY_STOP)
    room, candidates = rows - count, real.sum()
    most = torch.minimum(room, candidates)
    most = torch.where(rule[0] == BUDGET, torch.minimum(most, rule[1]), most)
    likely = (real & (a >= rule[1:2].view(torch.float32))).sum()
    most = torch.where(rule[0] == THRESHOLD, torch.minimum(most, likely), most)
    admitted_n = torch.minimum(most, torch.where(stops, n, len(a)).amin())
    rank = torch.empty_like(n).scatter_(0, order.indices, n)
    chosen = (rank < admitted_n).view(gamma, streams).sum(0)
    share = torch.div(room, drafting.sum().clamp_min(1), rounding_mode="floor")
    fixed = torch.minimum(rule[1].clamp_max(gamma), share) * drafting
    length = torch.where(rule[0] == FIXED, fixed, chosen).masked_fill(~active, -1).int()
    return Admitted(length, ((length + 1).cumsum(0) - (length + 1)).int(), survival)


def pack(
    admitted: Admitted,
    tokens: Tensor,  # [R, γ] int32: x_1 … x_γ
    anchor: Tensor,  # [R] int32
    position: Tensor,  # [R] int64: p
    slot: Tensor,  # [R] int64: the store slot of each stream's position 0
    rows: int,
) -> Packed:
    """Every stream's anchor and its first ℓ draft tokens, one after the other."""
    row = torch.arange(rows, device=tokens.device).unsqueeze(1)
    own = (row >= admitted.first) & (row < admitted.first + admitted.length + 1)  # [B, R]
    real, stream = own.any(1), own.int().argmax(1)
    offset = torch.where(real, row.squeeze(1) - admitted.first[stream], 0)
    drafted = tokens[stream, (offset - 1).clamp_min(0)] if tokens.shape[1] else anchor[stream]
    ids = torch.where(offset == 0, anchor[stream], drafted)
    where = torch.where(real, position[stream] + offset, 0)
    return Packed(
        stream.masked_fill(~real, -1),
        offset,
        ids.masked_fill(~real, 0).long(),
        where,
        (slot[stream] + where).masked_fill(~real, -1),
    )
