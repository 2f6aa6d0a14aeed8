"""The library's own layers with fewer launches, for GPUs: at one row a launch takes longer than what it does.

Norms, residual sums, rotary embedding and gated activation are one kernel each; projections that read the same input
are one product, over one matrix of which each keeps its rows. Modules keep their names and weights; only what their
forward calls is ours. Inference only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm

from dspark_kernels.layer_parts import add_rms_norm, rms_norm, rotate, silu_mul
from dspark_stream.models.torch.attention import Attend


def fuse_layers(module: nn.Module) -> int:
    """Give the known parts under ``module`` our forward; returns how many. Other families' stay as they are.

    After quantisation: quantised projections stay products of their own.
    """
    count = 0
    for part in module.modules():
        forward = FORWARD.get(type(part))
        if forward is None or (forward is _gated and not _is_silu(part)):
            continue
        _bind(part, forward)
        count += 1
    return count


def _bind(part: Any, forward: Callable[..., Any]) -> None:
    if forward is _attention:
        part.together = _one_matrix([part.q_proj, part.k_proj, part.v_proj])
    elif forward is _gated:
        part.together = _one_matrix([part.gate_proj, part.up_proj])
    part.forward = MethodType(forward, part)


def _one_matrix(layers: Sequence[Any]) -> tuple[Tensor, list[int]] | None:
    """The layers' weights as rows of one matrix, which they share from now on, and how many each has.

    None for layers that are not plain, or add a bias.
    """
    if any(type(layer) is not nn.Linear or layer.bias is not None for layer in layers):
        return None
    rows = [layer.out_features for layer in layers]
    matrix = torch.cat([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, matrix.split(rows), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    return matrix, rows


def _products(x: Tensor, together: tuple[Tensor, list[int]] | None, layers: Sequence[Any]) -> Sequence[Tensor]:
    if together is None:
        return [layer(x) for layer in layers]
    matrix, rows = together
    parts: Sequence[Tensor] = F.linear(x, matrix).split(rows, -1)
    return parts


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated(self: Any, x: Tensor) -> Tensor:
    gate, up = _products(x, self.together, [self.gate_proj, self.up_proj])
    product: Tensor = self.down_proj(silu_mul(gate, up))
    return product


def _is_silu(part: Any) -> bool:
    return getattr(part.config, "hidden_act", None) == "silu"


def _attention(
    self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *_: Any, attend: Attend, **__: Any
) -> tuple[Tensor, None]:
    """hidden_states [1, T, H] → [1, T, H]; what rows attend to is ``attend``'s to say, as in `families`."""
    projections = [self.q_proj, self.k_proj, self.v_proj]
    q, k, v = (
        x.squeeze(0).unflatten(-1, (-1, self.head_dim)) for x in _products(hidden_states, self.together, projections)
    )
    cos, sin = (x.reshape(-1, self.head_dim) for x in position_embeddings)
    if hasattr(self, "q_norm"):
        q, k = rotate(q, k, cos, sin, self.q_norm.weight, self.k_norm.weight, self.q_norm.variance_epsilon)
    else:
        q, k = rotate(q, k, cos, sin)
    out = attend(self.layer_idx, q, k, v, scale=self.scaling, window=getattr(self, "sliding_window", None))
    return self.o_proj(out.flatten(1).unsqueeze(0)), None


def _layer(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, **options
    )
    norm = self.post_attention_layernorm
    residual, normed = add_rms_norm(attended, hidden_states, norm.weight, norm.variance_epsilon)
    out: Tensor = residual + self.mlp(normed)
    return out


FORWARD: dict[type[nn.Module], Callable[..., Any]] = {
    LlamaRMSNorm: _norm,
    Qwen3RMSNorm: _norm,
    LlamaMLP: _gated,
    Qwen3MLP: _gated,
    LlamaAttention: _attention,
    Qwen3Attention: _attention,
    LlamaDecoderLayer: _layer,
    Qwen3DecoderLayer: _layer,
}
