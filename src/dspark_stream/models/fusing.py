"""The library's own layers with fewer launches: norms, rotary embedding and gated activation as one kernel each.

A decoder layer of `transformers` is some fifty launches for ten products, and on a GPU at one row a launch takes longer
than what it does. Modules keep their weights and names; only what their forward calls is ours. Inference only.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from dspark_kernels.layer_parts import rms_norm, rotate, silu_mul
from dspark_stream.models.attention import Attend


def fuse_layers(module: nn.Module) -> int:
    """Give the known parts under ``module`` our forward; returns how many. Other families' stay as they are."""
    count = 0
    for part in module.modules():
        forward = FORWARD.get(type(part))
        if forward is None or (forward is _gated and not _is_silu(part)):
            continue
        part.forward = MethodType(forward, part)
        count += 1
    return count


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated(self: Any, x: Tensor) -> Tensor:
    product: Tensor = self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))
    return product


def _is_silu(part: Any) -> bool:
    return getattr(part.config, "hidden_act", None) == "silu"


def _attention(
    self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *_: Any, attend: Attend, **__: Any
) -> tuple[Tensor, None]:
    """hidden_states [1, T, H] → [1, T, H]; what rows attend to is ``attend``'s to say, as in `families`."""
    shape = hidden_states.shape[:-1]
    q, k, v = (
        proj(hidden_states).view(-1, proj.out_features // self.head_dim, self.head_dim)
        for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    cos, sin = (x.reshape(-1, self.head_dim) for x in position_embeddings)
    if hasattr(self, "q_norm"):
        q, k = rotate(q, k, cos, sin, self.q_norm.weight, self.k_norm.weight, self.q_norm.variance_epsilon)
    else:
        q, k = rotate(q, k, cos, sin)
    out = attend(self.layer_idx, q, k, v, scale=self.scaling, window=getattr(self, "sliding_window", None))
    return self.o_proj(out.reshape(*shape, -1)), None


FORWARD: dict[type[nn.Module], Callable[..., Any]] = {
    LlamaRMSNorm: _norm,
    Qwen3RMSNorm: _norm,
    LlamaMLP: _gated,
    Qwen3MLP: _gated,
    LlamaAttention: _attention,
    Qwen3Attention: _attention,
}
