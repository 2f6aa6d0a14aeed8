"""The contract of ragged attention, in plain torch.

Shapes: T rows of all streams together, Hq query heads, Hk key/value heads, D head size, N token slots of the store.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = 64
"""Causal rows look at a multiple of this many keys, masked beyond their own: then a row's sums are grouped in the same
way however many rows are in its round, and its result is the same to the bit
(docs/decisions/007-attention-in-whole-blocks.md)."""
LEAST_ROWS = 8
"""Causal matrices of fewer folded rows are filled up to this many: without AVX-512 the library sums products of one to
three rows in another order (the same decision)."""


class Segment(NamedTuple):
    """One stream's rows in a ragged batch."""

    row: int
    """First row of the stream in the batch."""
    rows: int
    """How many rows it has."""
    slot: int
    """Store slot of the stream's position 0; position i lies at ``slot + i``."""
    start: int
    """Position of the first row."""


class SegmentTable(NamedTuple):
    """Segments as tensors, [S] int32 each: what a captured graph reads anew at every replay.

    A segment of no rows is nobody's. The two numbers are bounds that hold for every replay.
    """

    row: Tensor
    rows: Tensor
    slot: Tensor
    start: Tensor
    most_rows: int
    """No segment has more rows."""
    longest: int
    """No segment's ``start + rows`` is greater."""


def table_of(segments: list[Segment], device: torch.device) -> SegmentTable:
    """The table of segments that the host knows; bounds are powers of two, so that kernels are compiled for few."""
    columns = torch.tensor(segments, dtype=torch.int32).T.contiguous().to(device)
    row, rows, slot, start = columns.unbind(0)
    most_rows, longest = max(s.rows for s in segments), max(s.start + s.rows for s in segments)
    return SegmentTable(row, rows, slot, start, _power_of_two(most_rows), _power_of_two(longest))


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def attend_table(
    query: Tensor,  # [T, Hq, D]
    keys: Tensor,  # [N, Hk, D]
    values: Tensor,  # [N, Hk, Dv]
    table: SegmentTable,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> Tensor:  # [T, Hq, Dv]
    """`ragged_attention` over segments that only the device knows; nothing is read on the host.

    Rows that belong to no segment get zeros. Gathers every stream's longest possible past: right, not fast.
    """
    count, group = query.shape[0], query.shape[1] // keys.shape[1]
    row = torch.arange(count, device=query.device).unsqueeze(1)
    own = (row >= table.row) & (row < table.row + table.rows)  # [T, S]
    segment, real = own.int().argmax(1), own.any(1)
    at = torch.arange(table.longest, device=query.device)  # positions
    slots = (table.slot.unsqueeze(1) + at).clamp_max(keys.shape[0] - 1)  # [S, P]
    position = (table.start[segment] + row.squeeze(1) - table.row[segment]).unsqueeze(1)  # [T, 1]
    end = (table.start + table.rows)[segment].unsqueeze(1)
    seen = (at < end) & real.unsqueeze(1)  # [T, P]
    if causal:
        seen = seen & (at <= position)
    if window is not None:
        seen = seen & (at > position - window)
    k = keys[slots][segment].repeat_interleave(group, 2).float()  # [T, P, Hq, D]
    v = values[slots][segment].repeat_interleave(group, 2).float()
    scores = torch.einsum("thd,tphd->thp", query.float(), k) * scale
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    weights = weights.masked_fill(~seen.any(1)[:, None, None], 0.0)  # a row that sees nothing
    v = v.masked_fill(~seen[:, :, None, None], 0.0)  # what is not seen need not be finite
    out = torch.einsum("thp,tphd->thd", weights, v)
    return out.to(query.dtype)


def ragged_attention(
    query: Tensor,  # [T, Hq, D]
    keys: Tensor,  # [N, Hk, D]
    values: Tensor,  # [N, Hk, Dv]
    segments: list[Segment],
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    masks: dict[object, list[Tensor | None]] | None = None,
) -> Tensor:  # [T, Hq, Dv]
    """Each stream's rows attend to that stream's keys, positions 0 … start + rows - 1; to what is there, not to more.

    The rows' own keys and values must already be in the store. ``causal``: a row at position i sees positions
    ≤ i (verification, prefill); otherwise every row sees all of them (the drafter's block). ``window`` w limits
    a row to positions > i - w. ``masks`` is scratch that layers of one pass may share: the same rows need the same
    masks in every layer. Rows that share a key head are folded into one matrix, so keys are read once a
    group and never repeated.
    """
    out = _attend(query, keys, values, segments, scale, causal, window, {} if masks is None else masks)
    if causal and not out.sum().isfinite():
        for segment in segments:
            _attend_alone(out, query, keys, values, segment, scale, window)
    return out


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: list[Segment],
    scale: float,
    causal: bool,
    window: int | None,
    masks: dict[object, list[Tensor | None]],
) -> Tensor:
    """`ragged_attention` where everything that is looked at is a finite number, masked or not."""
    heads_q, heads_k = query.shape[1], keys.shape[1]
    group = heads_q // heads_k
    out = query.new_empty(query.shape[0], heads_q, values.shape[2])
    key = (group, causal, window)
    if key not in masks:
        masks[key] = [_mask(s, group, causal, window, keys.shape[0], query.device) for s in segments]
    for (row, rows, slot, start), mask in zip(segments, masks[key], strict=True):
        first = _first_key(start, window)
        length = start + rows - first if mask is None else mask.shape[1]
        q = query[row : row + rows].unflatten(1, (heads_k, group))  # [rows, Hk, G, D]
        q = q.permute(1, 2, 0, 3).reshape(1, heads_k, group * rows, -1)
        k = keys[slot + first : slot + first + length].transpose(0, 1).unsqueeze(0)
        v = values[slot + first : slot + first + length].transpose(0, 1).unsqueeze(0)
        if mask is not None and mask.shape[0] > q.shape[2]:
            q = F.pad(q, (0, 0, 0, mask.shape[0] - q.shape[2]))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        o = o[0, :, : group * rows].view(heads_k, group, rows, -1)
        out[row : row + rows] = o.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _attend_alone(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, segment: Segment, scale: float, window: int | None
) -> None:
    """A segment's rows that came out as no numbers once more, each over a copy of what it sees.

    What is masked weighs nothing, but nothing times no number is no number; and what lies behind a stream's own slots
    may be another's, or of one that has ended.
    """
    row, rows, slot, start = segment
    for i in range(row, row + rows):
        if out[i].isfinite().all():
            continue
        last = start + i - row
        first = _first_key(last, window)
        seen = last + 1 - first
        k, v = (stored.new_zeros(seen + PAD, *stored.shape[1:]) for stored in (keys, values))
        k[:seen], v[:seen] = keys[slot + first : slot + last + 1], values[slot + first : slot + last + 1]
        out[i] = _attend(query[i : i + 1], k, v, [Segment(0, 1, 0, seen - 1)], scale, True, None, {})[0]
        if window is None and not out[i].isfinite().all():
            out[i : row + rows] = torch.nan  # whoever comes after it sees what it has seen
            return


def _first_key(start: int, window: int | None) -> int:
    return 0 if window is None else max(0, start - window + 1)


def _mask(
    segment: Segment, group: int, causal: bool, window: int | None, slots: int, device: torch.device
) -> Tensor | None:
    """What a segment's folded rows may see, [group·rows or more, keys]; None where that is everything."""
    _, rows, slot, start = segment
    first = _first_key(start, window)
    length = start + rows - first
    if causal:
        length = min(-(-length // PAD) * PAD, slots - slot - first)  # the store's last slots have none behind them
    elif window is None:
        return None
    at = torch.arange(start, start + rows, device=device).unsqueeze(1)
    key_at = torch.arange(first, first + length, device=device)
    mask = key_at <= at if causal else torch.ones(rows, length, dtype=torch.bool, device=device)
    if window is not None:
        mask = mask & (key_at > at - window)
    mask = mask.repeat(group, 1)
    filling = max(0, LEAST_ROWS - mask.shape[0]) if causal else 0
    return torch.cat([mask, mask[-1:].expand(filling, -1)]) if filling else mask
