"""Matrix products with constant weights."""

from dspark_kernels.linear.packed import PackedLinear, can_pack, pack_linears

__all__ = ["PackedLinear", "can_pack", "pack_linears"]
