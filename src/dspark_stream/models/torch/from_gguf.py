"""GGUF files on the library's layers. Its reader drops or guesses much of what the metadata says, rotary scaling, head
sizes and score scales among it, without a word, and takes a minute for what takes seconds: so configs are made here,
weights read, and frequencies set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dspark_stream.errors import ModelLoadError
from dspark_stream.models.geometry import Geometry
from dspark_stream.models.gguf import GgufFile
from dspark_stream.models.rotary import Rotary


def config_of(geometry: Geometry, *, tied: bool, ends: tuple[int, ...]) -> Any:
    """The library's config; ``tied``: the LM head is the embedding."""
    from transformers import AutoConfig

    g = geometry
    fields: dict[str, Any] = {
        "vocab_size": g.vocab,
        "hidden_size": g.hidden_size,
        "intermediate_size": g.inner,
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
        "head_dim": g.head_size,
        "max_position_embeddings": g.positions,
        "rms_norm_eps": g.eps,
        "rope_parameters": g.rotary.parameters,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": list(ends) or None,
        "pad_token_id": None,
    }
    if g.windowed:
        local = g.local_rotary or g.rotary
        fields["rope_parameters"] = {"full_attention": g.rotary.parameters, "sliding_attention": local.parameters}
        fields["layer_types"] = [("full_attention", "sliding_attention")[windowed] for windowed in g.windowed]
        fields["sliding_window"] = g.window
        fields["query_pre_attn_scalar"] = g.head_size if g.score_scale is None else round(g.score_scale**-2)
    return AutoConfig.for_model(g.model_type, **fields)


def fill(model: Any, gguf: GgufFile, geometry: Geometry, name_of: Callable[[str], str]) -> None:
    """Give a causal language model its file's weights; ``name_of``: what a parameter is called there.

    Raises:
        ModelLoadError: a tensor missing, of the wrong shape, or of a type that nobody reads.
    """
    from gguf import GGMLQuantizationType, dequantize

    heads = {"q_proj": geometry.heads, "k_proj": geometry.kv_heads} if geometry.family.interleaved else {}
    for name, parameter in model.named_parameters():
        own = name_of(name)
        info, shape = gguf.tensor(own), tuple(parameter.shape)
        if info.shape != shape:
            raise ModelLoadError(f"{gguf.path}: {own} is {info.shape}, expected {shape}", param="model")
        blocks = gguf.bytes_of(own).reshape(*shape[:-1], -1)
        try:
            values = dequantize(blocks, GGMLQuantizationType(info.type)).reshape(shape)
        except NotImplementedError as error:
            raise ModelLoadError(f"{gguf.path}: {own} is of type {info.type_name}: {error}", param="model") from error
        if "norm" in name:
            values = values - np.float32(geometry.family.norm_offset)
        if count := heads.get(name.split(".")[-2]):
            values = values.reshape(count, shape[0] // count // 2, 2, -1).swapaxes(1, 2).reshape(shape)
        parameter.data.copy_(torch.from_numpy(np.array(values, dtype=np.float32)))


def turn_as(model: Any, geometry: Geometry) -> None:
    """Give a causal language model its file's frequencies: factors of its own for each a config cannot have."""
    embedding = model.get_decoder().rotary_emb
    if geometry.local_rotary is None:
        _set(embedding, "", geometry.rotary, geometry.head_size)
        return
    for kind, rotary, there in (
        ("full_attention_", geometry.rotary, not all(geometry.windowed)),
        ("sliding_attention_", geometry.local_rotary, any(geometry.windowed)),
    ):
        if there:
            _set(embedding, kind, rotary, geometry.head_size)


def _set(embedding: Any, prefix: str, rotary: Rotary, size: int) -> None:
    frequencies = torch.from_numpy(rotary.frequencies(size).astype(np.float32))
    for name in ("inv_freq", "original_inv_freq"):
        getattr(embedding, prefix + name).copy_(frequencies)
    setattr(embedding, prefix + "attention_scaling", rotary.amplitude)
