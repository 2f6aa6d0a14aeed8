"""The contract of linear layers over quantised weights, in plain torch.

Weights are rounded in groups of `GROUP` inputs of one output. 8 bits: signed, w = q·scale. 4 bits: unsigned,
w = q·scale + offset; a byte holds input i of a group's first half below and i of its second half above, so that a
kernel takes both halves out of one load without interleaving. Scales and offsets are float16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 64


class Quantised(NamedTuple):
    """A weight matrix [N, K]."""

    packed: Tensor
    """8 bits: [N, K] int8. 4 bits: [N, K/2] uint8."""
    scale: Tensor
    """[N, K/GROUP] float16."""
    offset: Tensor | None
    """[N, K/GROUP] float16; None for 8 bits."""
    bits: int


def quantise(weight: Tensor, bits: int) -> Quantised:
    """Round ``weight`` [N, K], K a multiple of GROUP, to 8 or 4 bits."""
    groups = weight.float().unflatten(1, (-1, GROUP))  # [N, K/GROUP, GROUP]
    if bits == 8:
        scale = (groups.abs().amax(-1) / 127).clamp_min(2.0**-24).half()
        q = (groups / scale.float().unsqueeze(-1)).round().clamp(-127, 127)
        return Quantised(q.flatten(1).to(torch.int8).contiguous(), scale, None, 8)
    low, high = groups.amin(-1), groups.amax(-1)
    scale, offset = ((high - low) / 15).clamp_min(2.0**-24).half(), low.half()
    q = ((groups - offset.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round().clamp(0, 15).to(torch.uint8)
    below, above = q.chunk(2, -1)
    return Quantised((below | (above << 4)).flatten(1).contiguous(), scale, offset, 4)


def dequantise(weight: Quantised) -> Tensor:
    """The matrix that `linear` multiplies by, [N, K] float32."""
    if weight.bits == 8:
        signed: Tensor = weight.packed.unflatten(1, (-1, GROUP)).float() * weight.scale.float().unsqueeze(-1)
        return signed.flatten(1)
    assert weight.offset is not None
    halves = weight.packed.unflatten(1, (-1, GROUP // 2))
    q = torch.cat((halves & 15, halves >> 4), -1).float()
    dense: Tensor = q * weight.scale.float().unsqueeze(-1) + weight.offset.float().unsqueeze(-1)
    return dense.flatten(1)


def linear(x: Tensor, weight: Quantised) -> Tensor:
    """x [..., K] → [..., N], summed in float32, returned in x's precision."""
    y: Tensor = x.float() @ dequantise(weight).T
    return y.to(x.dtype)
