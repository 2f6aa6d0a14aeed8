"""Attention of a ragged batch over streams' own stretches of one KV store."""

from __future__ import annotations

from torch import Tensor

from dspark_kernels.dispatch import interpreted, uses_triton
from dspark_kernels.ragged_attention import reference
from dspark_kernels.ragged_attention.reference import PAD, Segment, SegmentTable, table_of

__all__ = ["PAD", "Segment", "SegmentTable", "attend_table", "ragged_attention", "table_of"]


def attend_table(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: SegmentTable,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> Tensor:
    """See `reference.attend_table`."""
    if uses_triton(query.device):
        from dspark_kernels.ragged_attention import triton

        return triton.attend_table(query, keys, values, table, scale=scale, causal=causal, window=window)
    return reference.attend_table(query, keys, values, table, scale=scale, causal=causal, window=window)


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: list[Segment],
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    masks: dict[object, list[Tensor | None]] | None = None,
    tables: dict[object, SegmentTable] | None = None,
) -> Tensor:
    """See `reference.ragged_attention`; on a GPU the kernel, with the table made once a pass and kept in ``tables``."""
    if not uses_triton(query.device) or interpreted():
        return reference.ragged_attention(
            query, keys, values, segments, scale=scale, causal=causal, window=window, masks=masks
        )
    kept = {} if tables is None else tables
    if "table" not in kept:
        kept["table"] = table_of(segments, query.device)
    return attend_table(query, keys, values, kept["table"], scale=scale, causal=causal, window=window)
