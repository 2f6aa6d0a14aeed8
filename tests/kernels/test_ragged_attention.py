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
    k[~written], v[~written] = math.nan, math.nan  # nothing outside a stream's own past may be read
    got = ragged_attention(q, k, v, segments, scale=0.3, causal=causal, window=window)
    assert torch.allclose(got, naive(q, k, v, segments, 0.3, causal, window), atol=1e-5)


@pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU does not multiply bfloat16 in hardware"
)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_is_the_plain_one_and_ignores_company(bias):
    """Guards against a packed weight that differs, or a row whose result depends on the batch."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 160, bias=bias).bfloat16()
    packed = PackedLinear(linear)
    x = torch.randn(16, 96).bfloat16()
    with torch.inference_mode():
        whole = packed(x)
        assert torch.allclose(whole.float(), linear(x).float(), atol=2e-2)
        for n in (1, 3, 8):
            assert torch.equal(packed(x[:n]), whole[:n])
