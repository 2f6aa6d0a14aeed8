"""Attention over a table of segments, against the reference over a list of them (itself tested by a naive loop)."""

from __future__ import annotations

import math

import pytest
import torch

from dspark_kernels.ragged_attention.reference import Segment, SegmentTable, ragged_attention, table_of

ROUND = [Segment(0, 1, 0, 0), Segment(1, 8, 16, 9), Segment(9, 3, 48, 0), Segment(12, 5, 64, 30)]
LONG = [Segment(0, 3, 0, 700), Segment(3, 1, 1024, 255), Segment(4, 2, 1300, 256), Segment(6, 4, 1600, 509)]
PROMPT = [Segment(0, 35, 0, 0), Segment(35, 1, 64, 40), Segment(36, 19, 128, 45)]


def case(segments, heads, d, dv, dtype, device):
    """Queries, keys and values; NaN in every slot that no stream has written."""
    rows = sum(s.rows for s in segments)
    slots = max(s.slot + s.start + s.rows for s in segments) + 80
    q = torch.randn(rows, heads[0], d).to(dtype)
    k, v = torch.randn(slots, heads[1], d).to(dtype), torch.randn(slots, heads[1], dv).to(dtype)
    written = torch.zeros(slots, dtype=torch.bool)
    for s in segments:
        written[s.slot : s.slot + s.start + s.rows] = True
    finite = k.clone(), v.clone()
    k[~written], v[~written] = math.nan, math.nan
    return [x.to(device) for x in (q, k, v)], finite


SIZES = {
    "odd sizes": (ROUND, (4, 2), 24, 16),
    "three to a key": (ROUND, (3, 1), 64, 64),
    "several splits": (LONG, (6, 1), 16, 16),
    "prompt tiles": (PROMPT, (2, 1), 40, 40),
}
# 300 keys back is more than anything but the long pasts has
WINDOWS = [(name, window) for name in SIZES for window in (None, 5, 300) if window != 300 or name == "several splits"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("sizes", "window"), WINDOWS)
def test_against_the_list_of_segments(load, device, dtypes, sizes, causal, window):
    """Guards against rows that see other streams, the future, unwritten slots, or lose a split of their past."""
    torch.manual_seed(0)
    segments, heads, d, dv = SIZES[sizes]
    table = table_of(segments, device)
    for dtype in dtypes if causal else dtypes[:1]:  # what a precision changes, causality does not
        (q, k, v), (fk, fv) = case(segments, heads, d, dv, dtype, device)
        got = load("ragged_attention").attend_table(q, k, v, table, scale=0.3, causal=causal, window=window)
        expected = ragged_attention(
            q.cpu().float(), fk.float(), fv.float(), segments, scale=0.3, causal=causal, window=window
        )
        limit = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(got.cpu().float(), expected, atol=limit, rtol=limit)


def test_splits_grow_with_the_context(load, device, implementation, monkeypatch):
    """Guards against a past that has more keys than splits of the least size hold."""
    module = load("ragged_attention")
    if implementation == "triton":
        monkeypatch.setattr(module, "MOST_SPLITS", 2)
        monkeypatch.setattr(module, "LEAST_SPLIT", 64)
    torch.manual_seed(0)
    (q, k, v), (fk, fv) = case(LONG, (4, 2), 16, 16, torch.float32, device)
    for window in (None, 300):
        got = module.attend_table(q, k, v, table_of(LONG, device), scale=0.3, causal=True, window=window)
        expected = ragged_attention(q.cpu(), fk, fv, LONG, scale=0.3, causal=True, window=window)
        torch.testing.assert_close(got.cpu(), expected, atol=2e-5, rtol=2e-5)


def test_rows_of_nobody_are_zero_and_empty_segments_do_nothing(load, device):
    """Guards against padding rows that keep what was in memory: NaN would spread through a captured round."""
    torch.manual_seed(0)
    q, k = torch.randn(12, 4, 16, device=device), torch.randn(700, 2, 16, device=device)
    table = SegmentTable(
        *torch.tensor([[0, 9, 3], [3, 0, 2], [0, 5, 320], [300, 7, 11]], dtype=torch.int32, device=device),
        most_rows=8,
        longest=400,
    )
    got = load("ragged_attention").attend_table(q, k, k, table, scale=0.25, causal=True)
    expected = ragged_attention(
        q.cpu(), k.cpu(), k.cpu(), [Segment(0, 3, 0, 300), Segment(3, 2, 320, 11)], scale=0.25, causal=True
    )
    torch.testing.assert_close(got[:5].cpu(), expected[:5], atol=2e-5, rtol=2e-5)
    assert not got[5:].any()


def test_a_row_does_not_know_its_company(load, device):
    """Guards against text that changes with the verification length: the same splits for one row and for eight."""
    torch.manual_seed(0)
    q, k = torch.randn(8, 4, 32, device=device), torch.randn(1000, 2, 32, device=device)
    attend = load("ragged_attention").attend_table
    for start in (60, 250, 511):
        whole = attend(q, k, k, _bounded([Segment(0, 8, 16, start)], device), scale=0.2, causal=True)
        for j in (0, 3, 7):
            one = _bounded([Segment(0, 1, 16, start + j)], device)
            alone = attend(q[j : j + 1], k, k, one, scale=0.2, causal=True)
            torch.testing.assert_close(alone[0], whole[j], atol=1e-6, rtol=1e-6)


def _bounded(segments: list[Segment], device: torch.device) -> SegmentTable:
    return table_of(segments, device)._replace(most_rows=8, longest=900)
