"""Linear layers over 8- and 4-bit weights, for the few rows of a draft block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_kernels.dispatch import uses_triton
from dspark_kernels.weight_only import reference
from dspark_kernels.weight_only.reference import GROUP, Quantised, dequantise, quantise

__all__ = ["GROUP", "Quantised", "WeightOnlyLinear", "dequantise", "linear", "quantise"]

MOST_ROWS = 1024
"""Rows up to which the kernel reads weights as they are: every draft block of a captured round. More, a prompt's
context features, are worth a dense copy."""


def linear(x: Tensor, weight: Quantised) -> Tensor:
    """See `reference.linear`."""
    if x.numel() and uses_triton(x.device):
        if x.flatten(0, -2).shape[0] > MOST_ROWS:
            return F.linear(x, dequantise(weight).to(x.dtype))
        from dspark_kernels.weight_only import triton

        return triton.linear(x, weight)
    return reference.linear(x, weight)


class WeightOnlyLinear(nn.Module):
    """`torch.nn.Linear` over quantised weights, inference only. x [..., in] → [..., out]."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        packed = quantise(layer.weight.detach(), bits)
        self.register_buffer("packed", packed.packed)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("offset", packed.offset)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.packed: Tensor
        self.scale: Tensor
        self.offset: Tensor | None
        self.bias: Tensor | None

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        """The product, plus bias where there is one."""
        y = linear(x, Quantised(self.packed, self.scale, self.offset, self.bits))
        return y if self.bias is None else y + self.bias
