"""bfloat16 linear layers whose weight is laid out once for the CPU's matrix units.

The contract is `torch.nn.Linear`. oneDNN re-orders a plain weight at every call; a weight re-ordered once saves a
quarter to a third of that (docs/decisions/003-cpu-precision.md), and a row's result does not depend on how many
other rows are in the batch, so plain decoding and verification agree to the bit in every linear layer.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

MOST_ROWS = 128
"""Rows of one product. With more of them oneDNN may divide the sum over the inputs in another way, and a row's result
would depend on its company."""


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine multiplies bfloat16 in hardware and torch can pack for it."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        # oneDNN takes AVX-512 without bfloat16 for enough, and emulates: rows then depend on their company
        and (platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported())
    )


class PackedLinear(nn.Module):
    """`torch.nn.Linear` in bfloat16, inference only. x [..., in] → [..., out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 1)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """The product, plus bias where there is one."""
        rows = x.flatten(0, -2)
        if len(rows) <= MOST_ROWS:
            return self._product(x)
        parts = [self._product(part) for part in rows.split(MOST_ROWS)]
        return torch.cat(parts).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


def pack_linears(module: nn.Module) -> int:
    """Replace every plain `torch.nn.Linear` under ``module`` by a packed one; returns how many."""
    packed = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16:
                setattr(parent, name, PackedLinear(child))
                packed += 1
    return packed
