"""Sizes and constants of a Llama-like model, as a `config.json` of `transformers` or a GGUF file's metadata has them.

The CPU's kernels need no more of a config than this; the library that would read all of it takes 150 MB and three
seconds to import.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from dspark_stream.errors import ModelLoadError

KERNEL_FAMILIES = ("llama", "qwen3")
"""Families that the CPU's kernels run."""
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Constant = Annotated[float, msgspec.Meta(gt=0.0, le=1e12)]


class UnsupportedError(Exception):
    """A model that the CPU's kernels cannot run; torch can. The message says why."""


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernels are told about a model."""

    model_type: str
    hidden_size: Size
    heads: Size
    kv_heads: Size
    head_size: Size
    inner: Size
    positions: Size
    layers: Size
    vocab: Size
    eps: Constant
    rope_base: Constant


class _Fields(msgspec.Struct):
    """The fields of a `config.json` that matter here, with the library's defaults where it has the same for all."""

    hidden_size: Size
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    num_hidden_layers: Size
    vocab_size: Size
    rms_norm_eps: Constant = 1e-6
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rope_theta: Constant | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool | None = False
    mlp_bias: bool | None = False
    hidden_act: str | None = "silu"


def checked(geometry: dict[str, Any], source: str, param: str = "model") -> Geometry:
    """A geometry whose numbers are in range.

    Raises:
        ModelLoadError: one that is not; the message names ``source``, the field and its limit.
    """
    try:
        return msgspec.convert(geometry, Geometry)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"{source}: {error}", param=param) from error


def geometry_of(raw: dict[str, Any], source: str, param: str = "model") -> Geometry:
    """Of a `config.json`, read from ``source``.

    Raises:
        UnsupportedError: a family or a setting that the kernels cannot do.
        ModelLoadError: a field that is missing, of another type or out of range.
    """
    family = raw.get("model_type")
    if family not in KERNEL_FAMILIES:
        raise UnsupportedError(f"model type {family}")
    try:
        fields = msgspec.convert(raw, _Fields)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"{source}: {error}", param=param) from error
    for rope in (fields.rope_parameters or {}, fields.rope_scaling or {}):
        if any(isinstance(value, dict) for value in rope.values()):
            raise UnsupportedError("rotary positions that differ by layer")
        if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
            raise UnsupportedError(f"its rotary positions are scaled ({kind})")
    if fields.attention_bias or fields.mlp_bias:
        raise UnsupportedError("its layers have biases")
    if fields.hidden_act != "silu":
        raise UnsupportedError(f"its activation is {fields.hidden_act}")
    heads = fields.num_attention_heads
    own = {"qwen3": 128}.get(family)  # the library's default of the family; else what the heads divide
    return checked(
        {
            "model_type": family,
            "hidden_size": fields.hidden_size,
            "heads": heads,
            "kv_heads": fields.num_key_value_heads or heads,
            "head_size": fields.head_dim or own or fields.hidden_size // heads,
            "inner": fields.intermediate_size,
            "positions": fields.max_position_embeddings,
            "layers": fields.num_hidden_layers,
            "vocab": fields.vocab_size,
            "eps": fields.rms_norm_eps,
            "rope_base": (fields.rope_parameters or {}).get("rope_theta") or fields.rope_theta or 10000.0,
        },
        source,
        param,
    )
