"""What is taken from `transformers`: each family's layers, and the name under which they find our attention.

Importing a family's modelling code takes some 100 MB and more than a second: only models that run on torch do.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dspark_stream.models.families import FAMILIES
from dspark_stream.models.torch.attention import ATTENTION_NAME, Attend

__all__ = ["ATTENTION_NAME", "apply_rotary_pos_emb", "layers_of"]


def layers_of(family: str) -> tuple[type[nn.Module], type[nn.Module], type[nn.Module]]:
    """Decoder layer, norm and rotary embedding of a family, by the config's `model_type`."""
    place, _, prefix = FAMILIES[family].layers.rpartition(".")
    module = import_module(f"transformers.models.{place}")
    norm = prefix.removesuffix("Text")  # the norm is shared with the family's other towers
    return (
        getattr(module, f"{prefix}DecoderLayer"),
        getattr(module, f"{norm}RMSNorm"),
        getattr(module, f"{prefix}RotaryEmbedding"),
    )


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attend: Attend,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    layer: int = module.layer_idx  # type: ignore[assignment]
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend(layer, q, k, v, scale=scaling, window=sliding_window).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
