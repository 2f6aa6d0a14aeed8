"""Attention of a ragged batch over streams' own stretches of one KV store."""

from dspark_kernels.ragged_attention.reference import PAD, Segment, ragged_attention

__all__ = ["PAD", "Segment", "ragged_attention"]
