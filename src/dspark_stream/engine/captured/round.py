"""One round, draft → schedule → verify → accept → commit, as tensor operations alone.

Nothing here reads a tensor's value on the host, so the whole function can be captured once and replayed
(`graphs.py`); run eagerly it is the same round, which is how it is tested without a GPU. Shapes depend on the numbers
of seats and rows, never on what streams do: seats of nobody and rows that no stream wants are computed and thrown away.

Symbols: R seats of this round, γ block size, B rows of the target pass, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.acceptance import Accepted, accept
from dspark_kernels.admission import Admitted, Packed, admit, pack
from dspark_kernels.ragged_attention import SegmentTable
from dspark_kernels.sequential_head import HeadWeights, prepare, walk
from dspark_kernels.streams import Drafts
from dspark_stream.engine.captured.adjusting import adjusted_drafts, adjusted_rows
from dspark_stream.engine.captured.state import RoundState
from dspark_stream.models.torch.attention import TableAttend
from dspark_stream.models.torch.drafter import Drafter
from dspark_stream.models.torch.store import KVStore
from dspark_stream.models.torch.target import Target


class RoundModels(NamedTuple):
    """What a round computes with."""

    target: Target
    target_kv: KVStore
    drafter: Drafter | None
    drafter_kv: KVStore | None
    head: HeadWeights | None
    candidates: int
    """Tokens a slot that the sequential head scores."""
    longest: int
    """Most positions that a stream can hold, a block beyond its end included."""


class Drafted(NamedTuple):
    """A draft block for every seat."""

    drafts: Drafts
    confidence: Tensor
    """Logits, [R, γ]."""


@torch.inference_mode()
def run_round(
    models: RoundModels, state: RoundState, seats: int, rows: int, drafting: bool, context: bool = False
) -> None:
    """One round of the first ``seats`` seats with ``rows`` rows to verify; state and caches move on in place.

    Args:
        models, state: what the round works on.
        seats, rows: see `graphs.Size`.
        drafting: False leaves the draft pass out: plain decoding, by the same way.
        context: without drafting, give the drafter what it would need to draft in a later round.
    """
    live = (state.active[:seats] != 0) & (state.position[:seats] < state.limit[:seats])
    drafts_here = (state.drafting[:seats] != 0) & live
    drafted = _draft(models, state, seats, drafts_here) if drafting else _nothing(state, seats)
    gamma = drafted.drafts.tokens.shape[1]
    admitted = admit(
        drafted.confidence + state.shift[:seats, :gamma],
        state.calibration[:seats, :gamma].contiguous() if drafting else torch.ones_like(drafted.confidence),
        drafts_here if drafting else torch.zeros_like(drafts_here),
        live,
        state.rule,
        state.sps,
        rows,
    )
    packed = pack(
        admitted, drafted.drafts.tokens, state.anchor[:seats], state.position[:seats], state.slot[:seats], rows
    )
    logits, taps = _verify(models, state, seats, admitted, packed, gamma)
    if state.adjustments:
        logits = adjusted_rows(logits, admitted, drafted.drafts.tokens, state.adjustments)
    outcome = accept(logits, admitted.first, admitted.length, drafted.drafts, state.sampling(seats))
    if models.drafter is not None and (drafting or context):
        _keep_context(models, packed, outcome, drafts_here, taps)
    _commit(state, seats, drafted.drafts.tokens, admitted, outcome, drafting)


def _nothing(state: RoundState, seats: int) -> Drafted:
    """A block that nobody verifies: plain decoding is a round with ℓ = 0."""
    zeros = torch.zeros(seats, 1, dtype=torch.int32, device=state.device)
    real = torch.zeros(seats, 1, device=state.device)
    return Drafted(Drafts(zeros, zeros.unsqueeze(2), real.unsqueeze(2), real), real)


def _draft(models: RoundModels, state: RoundState, seats: int, here: Tensor) -> Drafted:
    """One backbone pass over every seat's block, then the walk."""
    drafter, store, head = models.drafter, models.drafter_kv, models.head
    assert drafter is not None
    assert store is not None
    assert head is not None
    gamma, device = drafter.gamma, state.device
    anchor, start = state.anchor[:seats], state.position[:seats]
    k = torch.arange(gamma, device=device)
    ids = torch.where(k == 0, anchor.unsqueeze(1), drafter.config.mask_token_id).long()  # [R, γ]
    positions = torch.where(here.unsqueeze(1), start.unsqueeze(1) + k, 0)
    slots = torch.where(here.unsqueeze(1), state.slot[:seats].unsqueeze(1) + positions, -1)
    window = drafter.context_window or models.longest
    seen = start.clamp(max=window)  # a block's segment begins where its window does
    table = SegmentTable(
        torch.arange(0, seats * gamma, gamma, dtype=torch.int32, device=device),
        here.int() * gamma,
        (state.slot[:seats] + start - seen).int(),
        seen.int(),
        gamma,
        min(models.longest, window + gamma),
    )
    attend = TableAttend(store, slots.flatten(), table, causal=False)
    hidden = drafter.block_hidden(ids.flatten(), positions.flatten(), attend).view(seats, gamma, -1)
    base = drafter.base_logits(hidden)
    if state.adjustments:
        base = adjusted_drafts(base, drafter.draft_ids, state.adjustments)
    prepared = prepare(base, hidden, head, models.candidates)
    walked = walk(prepared, anchor, head, state.sampling(seats))
    confidence = walked.confidence
    if confidence is None:
        confidence = state.history.expand(seats, gamma).contiguous()
    return Drafted(walked.drafts, confidence)


def _verify(
    models: RoundModels, state: RoundState, seats: int, admitted: Admitted, packed: Packed, gamma: int
) -> tuple[Tensor, Tensor]:
    """One target pass over B packed rows: logits [B, V] and taps [B, taps·H]."""
    target = models.target
    table = SegmentTable(
        admitted.first,
        admitted.length + 1,
        state.slot[:seats].int(),
        state.position[:seats].int(),
        min(gamma + 1, len(packed.ids)),
        models.longest,
    )
    attend = TableAttend(models.target_kv, packed.slot, table, causal=True)
    hidden, taps = target.forward_with(packed.ids, packed.position, attend)
    return target.logits(hidden), taps


def _keep_context(models: RoundModels, packed: Packed, outcome: Accepted, here: Tensor, taps: Tensor) -> None:
    """Context features of the anchor and the accepted tokens; the other rows' go to the slot that is nobody's."""
    drafter, store = models.drafter, models.drafter_kv
    assert drafter is not None
    assert store is not None
    stream = packed.stream.clamp_min(0)
    kept = (packed.stream >= 0) & here[stream] & (packed.offset <= outcome.accepted[stream])
    slots = torch.where(kept, packed.slot, store.keys[0].shape[0] - 1)
    drafter.write_context(taps, packed.position, slots, store)


def _commit(
    state: RoundState, seats: int, tokens: Tensor, admitted: Admitted, outcome: Accepted, drafting: bool
) -> None:
    """Anchors and positions move on; what happened is laid out for the host."""
    live = outcome.accepted >= 0
    state.position[:seats] += outcome.accepted + 1
    # a stream without a next token ends once the host has read it; until then its rounds need one that there is
    state.anchor[:seats] = torch.where(live & (outcome.bonus >= 0), outcome.bonus, state.anchor[:seats])
    out = state.outcome[:seats]
    out[:, 0] = outcome.accepted
    out[:, 1] = outcome.bonus
    out[:, 2] = admitted.length
    if drafting:
        out[:, 3:] = tokens
        state.survival[:seats] = admitted.survival
