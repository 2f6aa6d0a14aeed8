"""Sizes and constants of a Llama-like model, as a `config.json` of `transformers` or a GGUF file's metadata has them.

The CPU's kernels need no more of a config than this; the library that would read all of it takes 150 MB and three
seconds to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dspark_stream.errors import ModelLoadError

FAMILIES = ("llama", "qwen3")


class UnsupportedError(Exception):
    """A model that the CPU's kernels cannot run; torch can. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What the kernels are told about a model."""

    model_type: str
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    positions: int
    layers: int
    vocab: int
    eps: float
    rope_base: float

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.heads, self.kv_heads, self.inner, self.head_size, self.positions, self.layers)
        if min(*sizes, self.vocab) < 1:
            raise ModelLoadError("a size below 1 in its metadata", param="model")


def geometry_of(raw: dict[str, Any]) -> Geometry:
    """Of a `config.json`.

    Raises:
        UnsupportedError: a family or a setting that the kernels cannot do.
        ModelLoadError: a field that is missing or no number.
    """
    try:
        family = raw["model_type"]
        if family not in FAMILIES:
            raise UnsupportedError(f"model type {family}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
            raise UnsupportedError(f"its rotary positions are scaled ({kind})")
        if raw.get("attention_bias") or raw.get("mlp_bias"):
            raise UnsupportedError("its layers have biases")
        if (activation := raw.get("hidden_act", "silu")) != "silu":
            raise UnsupportedError(f"its activation is {activation}")
        hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        return Geometry(
            model_type=family,
            hidden_size=hidden,
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_size=int(raw.get("head_dim") or hidden // max(1, heads)),
            inner=int(raw["intermediate_size"]),
            positions=int(raw["max_position_embeddings"]),
            layers=int(raw["num_hidden_layers"]),
            vocab=int(raw["vocab_size"]),
            eps=float(raw["rms_norm_eps"]),
            rope_base=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"its config cannot be used: {error!r}", param="model") from error
