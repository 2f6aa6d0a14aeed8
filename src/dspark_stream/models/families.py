"""What is taken from `transformers`: each family's layers, and the name under which they find our attention.

Importing this loads the library's modelling code, some 100 MB and more than a second: only models that run on torch do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextDecoderLayer,
    Gemma4TextRotaryEmbedding,
)
from transformers.models.gemma4_unified.modeling_gemma4_unified import (
    Gemma4UnifiedRMSNorm,
    Gemma4UnifiedTextDecoderLayer,
    Gemma4UnifiedTextRotaryEmbedding,
)
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from dspark_stream.models.attention import ATTENTION_NAME, Attend

__all__ = ["ATTENTION_NAME", "LAYERS", "apply_rotary_pos_emb"]

LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module], type[nn.Module]]] = {
    "llama": (LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding),
    "qwen3": (Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding),
    "gemma4_text": (Gemma4TextDecoderLayer, Gemma4RMSNorm, Gemma4TextRotaryEmbedding),
    "gemma4_unified_text": (Gemma4UnifiedTextDecoderLayer, Gemma4UnifiedRMSNorm, Gemma4UnifiedTextRotaryEmbedding),
}
"""Decoder layer, norm and rotary embedding of each family, by the config's `model_type`."""


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
