"""Ragged attention against a naive loop over rows and heads."""

from __future__ import annotations

import math

import pytest
import torch

from dspark_kernels.linear import PackedLinear, can_pack
from dspark_kernels.ragged_attention import Segment, ragged_attention


def naive(q, k, v, segments, scale, causal, window):
    out = torch.full((q.shape[0], q.shape[1], v.shape[2]), math.nan)
    group = q.shape[1] // k.shape[1]
    for row, rows, slot, start in segments:
        for i in range(rows):
            for h in range(q.shape[1]):
                last = start + i if causal else start + rows - 1
                first = 0 if window is None else max(0, start + i - window + 1)
                at = torch.arange(slot + first, slot + last + 1)
                w = torch.softmax((k[at, h // group] @ q[row + i, h]) * scale, 0)
                out[row + i, h] = w @ v[at, h // group]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
def test_against_the_naive_loop(causal, window, heads):
    """Guards against rows that see other streams, the future, or slots outside their window."""
    torch.manual_seed(0)
    segments = [Segment(0, 1, 0, 0), Segment(1, 4, 16, 9), Segment(5, 3, 48, 0), Segment(8, 1, 64, 30)]
    q = torch.randn(9, heads[0], 8)
    k, v = torch.randn(96, heads[1], 8), torch.randn(96, heads[1], 6)
    written = torch.zeros(96, dtype=torch.bool)
    for _, rows, slot, start in segments:
        written[slot : slot + start + rows] = True
    k[~written], v[~written] = 1e3, 1e3  # what is not a stream's own past may be looked at, but must not count
    got = ragged_attention(q, k, v, segments, scale=0.3, causal=causal, window=window)
    assert torch.allclose(got, naive(q, k, v, segments, 0.3, causal, window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_spoils_nobody_who_does_not_see_it(window, bad):
    """Guards against a stream that spoils those whose slots lie beside its own, and against drafts that spoil the rows
    before them: masked numbers weigh nothing, but nothing times NaN is NaN."""
    torch.manual_seed(0)
    segments = [Segment(0, 1, 0, 12), Segment(1, 4, 16, 9), Segment(5, 20, 48, 0), Segment(25, 1, 80, 30)]
    q, k, v = torch.randn(26, 4, 8), torch.randn(256, 2, 8), torch.randn(256, 2, 6)
    want = ragged_attention(q, k, v, segments, scale=0.3, causal=True, window=window)
    spoilt = torch.tensor([16 + 11, 48 + 9, 80 + 31, 130])  # rows 3 and 14 on, and two that nobody has written
    k[spoilt], v[spoilt] = bad, bad
    got = ragged_attention(q, k, v, segments, scale=0.3, causal=True, window=window)
    seeing = [3, 4, *range(14, 25 if window is None else 19)]
    assert not got[seeing].isfinite().any()
    others = [row for row in range(26) if row not in seeing]
    assert torch.allclose(got[others], want[others], atol=1e-5)


@pytest.mark.parametrize("heads", [9, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_know_how_many_rows_are_in_its_round(dtype, heads):
    """Guards against text that changes with the verification length: alone or with others, the same bits.

    With AVX-512 the library needs no filled rows for it, without it does (docs/decisions/007).
    """
    torch.manual_seed(0)
    k, v = torch.randn(2048, 3, 64).to(dtype), torch.randn(2048, 3, 64).to(dtype)
    for start in (0, 1, 15, 60, 63, 64, 200, 505, 511, 900, 1500):
        q = torch.randn(8, heads, 64).to(dtype)
        whole = ragged_attention(q, k, v, [Segment(0, 8, 16, start)], scale=0.125, causal=True)
        for rows in (1, 2, 3, 5, 7):
            for j in range(0, 9 - rows, rows):
                some = [Segment(0, rows, 16, start + j)]
                assert torch.equal(
                    ragged_attention(q[j : j + rows], k, v, some, scale=0.125, causal=True), whole[j : j + rows]
                )


@pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU does not multiply bfloat16 in hardware"
)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_is_the_plain_one_and_ignores_company(bias):
    """Guards against a packed weight that differs, or a row whose result depends on the batch."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 160, bias=bias).bfloat16()
    packed = PackedLinear(linear)
    x = torch.randn(300, 96).bfloat16()
    with torch.inference_mode():
        whole = packed(x)
        assert torch.allclose(whole.float(), linear(x).float(), atol=2e-2)
        assert torch.equal(packed(x.view(3, 100, 96)).view(300, 160), whole)
        alone = torch.cat([packed(row) for row in x.split(1)])
        assert torch.equal(alone, whole)
        for n in (3, 8, 33, 128, 200):
            assert torch.equal(packed(x[:n]), alone[:n])
