"""Rotary positions of a GGUF file on the library's layers: its reader drops their scaling without a word."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dspark_stream.models.geometry import Geometry
from dspark_stream.models.rotary import Rotary


def turn_as(model: Any, geometry: Geometry) -> None:
    """Give a causal language model the frequencies that its file says."""
    embedding = model.get_decoder().rotary_emb
    if geometry.local_rotary is None:
        _set(embedding, "", geometry.rotary, geometry.head_size)
        return
    _set(embedding, "full_attention_", geometry.rotary, geometry.head_size)
    _set(embedding, "sliding_attention_", geometry.local_rotary, geometry.head_size)


def _set(embedding: Any, prefix: str, rotary: Rotary, size: int) -> None:
    frequencies = torch.from_numpy(rotary.frequencies(size).astype(np.float32))
    for name in ("inv_freq", "original_inv_freq"):
        buffer = getattr(embedding, prefix + name)
        if buffer.shape != frequencies.shape:
            raise ValueError(f"{prefix}{name} is {tuple(buffer.shape)}, expected {tuple(frequencies.shape)}")
        buffer.copy_(frequencies)
    setattr(embedding, prefix + "attention_scaling", rotary.amplitude)
