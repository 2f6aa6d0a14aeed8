"""What layers on the CPU kernels compute, in plain torch: what every instruction set's path is tested against.

Tokens are drawn as `dspark_kernels/drawing/reference.py` says, and walks are the engine's own (models/torch/walk.py).

Weights are taken dequantised (`PackedMatrix.rows` gives them back exactly); activations are rounded here as there, so
results agree but for the order of additions. Symbols as in `llama.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32


def round_activations(x: Tensor) -> Tensor:
    """x [..., K] in signed bytes with a scale for each group of 32, as floats again."""
    groups = x.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (groups / scale).round() * scale, 0.0).flatten(-2)


def product(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] · w [N, K]ᵀ."""
    return round_activations(x) @ w.T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight ⊙ x / rms(x)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class LayerReference(NamedTuple):
    """One layer's weights, dequantised; see `LayerWeights` in llama.py."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    bias: Tensor | None = None
    after_attention: Tensor | None = None
    after_mlp: Tensor | None = None
    window: int = 0
    rope: int = 0


class LlamaReference:
    """One stream's layers; its keys and values are kept as lists of rows, in float16 or bfloat16.

    ``ropes``: tables [positions, D/2] of cosines and of sines. ``score_scale``: of query · key, None: 1/√D.
    ``gelu``: the gate's activation is GELU by tanh, else SiLU. ``bfloat``: attention by a matrix unit, its factors all
    bfloat16, the weights too, before they are divided by their sum.
    """

    def __init__(
        self,
        layers: list[LayerReference],
        final_norm: Tensor,
        ropes: Sequence[tuple[Tensor, Tensor]],
        *,
        heads: int,
        kv_heads: int,
        eps: float,
        score_scale: float | None = None,
        gelu: bool = False,
        bfloat: bool = False,
    ) -> None:
        self.bfloat = bfloat
        self.layers, self.final_norm, self.ropes = layers, final_norm, ropes
        self.heads, self.kv_heads, self.eps, self.gelu = heads, kv_heads, eps, gelu
        self.size = 2 * ropes[0][0].shape[1]
        self.score_scale = score_scale or self.size**-0.5
        self.keys: list[dict[int, Tensor]] = [{} for _ in layers]
        self.values: list[dict[int, Tensor]] = [{} for _ in layers]

    def _turn(self, x: Tensor, positions: Tensor, rope: int) -> Tensor:
        """x [T, heads, D] by rotary positions [T]."""
        cos, sin = (table[positions].unsqueeze(1) for table in self.ropes[rope])
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def _project(self, i: int, x: Tensor, positions: Tensor) -> Tensor:
        """Queries [T, Hq, D]; keys and values of normed x [T, H] are kept at their positions."""
        layer = self.layers[i]
        parts = [product(x, w) for w in (layer.q, layer.k, layer.v)]
        if layer.bias is not None:
            parts = [p + b for p, b in zip(parts, layer.bias.split([p.shape[-1] for p in parts]), strict=True)]
        q, k, v = (p.unflatten(-1, (-1, self.size)) for p in parts)
        q = q if layer.q_norm is None else rms_norm(q, layer.q_norm, self.eps)
        k = k if layer.k_norm is None else rms_norm(k, layer.k_norm, self.eps)
        k = self._turn(k, positions, layer.rope)
        for row, p in enumerate(positions.tolist()):
            self.keys[i][p], self.values[i][p] = self._round(k[row]), self._round(v[row])
        q = self._turn(q, positions, layer.rope)
        return self._round(q) if self.bfloat else q

    def _round(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16 if self.bfloat else torch.float16).float()

    def append_context(self, features: Tensor, positions: Tensor) -> None:
        """Keys and values of normed context features [T, H]."""
        for i in range(len(self.layers)):
            self._project(i, features, positions)

    def forward(
        self, x: Tensor, positions: Tensor, visible: Tensor, begin: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Final hidden [T, H] of x [T, H], and every layer's output. Row t sees positions begin[t] … visible[t] - 1, in
        layers with a window the last of them. ``begin`` None: 0.
        """
        outputs: list[Tensor] = []
        begin = torch.zeros_like(visible) if begin is None else begin
        for i, layer in enumerate(self.layers):
            q = self._project(i, rms_norm(x, layer.input_norm, self.eps), positions)
            first = torch.maximum(begin, visible - layer.window) if layer.window else begin
            rows = [self._attend(i, *row) for row in zip(q, first.tolist(), visible.tolist(), strict=True)]
            x = x + self._normed(product(torch.stack(rows), layer.o), layer.after_attention)
            normed = rms_norm(x, layer.post_norm, self.eps)
            inner = self._activated(product(normed, layer.gate)) * product(normed, layer.up)
            x = x + self._normed(product(inner, layer.down), layer.after_mlp)
            outputs.append(x)
        return rms_norm(x, self.final_norm, self.eps), outputs

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else rms_norm(x, weight, self.eps)

    def _activated(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh") if self.gelu else torch.nn.functional.silu(x)

    def _attend(self, i: int, q: Tensor, begin: int, visible: int) -> Tensor:
        """One row's heads [Hq, D] over what it sees → [Hq·D]."""
        keys = torch.stack([self.keys[i][p] for p in range(begin, visible)], 1)  # [Hk, n, D]
        values = torch.stack([self.values[i][p] for p in range(begin, visible)], 1)
        group = q.unflatten(0, (self.kv_heads, -1))  # [Hk, G, D]
        scores = group @ keys.transpose(1, 2) * self.score_scale
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        total = weights.sum(-1, keepdim=True)
        return ((self._round(weights) if self.bfloat else weights) @ values / total).flatten()
