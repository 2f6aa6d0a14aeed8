"""Launch every kernel as rounds launch it, in shapes that people have: SmolLM2-135M, Qwen3-4B and Qwen3-8B."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_kernels.acceptance import triton as acceptance
from dspark_kernels.admission import triton as admission
from dspark_kernels.admission.reference import Admitted
from dspark_kernels.layer_parts import triton as layer_parts
from dspark_kernels.ragged_attention import triton as ragged_attention
from dspark_kernels.ragged_attention.reference import Segment, table_of
from dspark_kernels.sequential_head import triton as sequential_head
from dspark_kernels.sequential_head.reference import HeadWeights, Prepared
from dspark_kernels.streams import Drafts, Sampling
from dspark_kernels.weight_only import triton as weight_only
from dspark_kernels.weight_only.reference import GROUP, Quantised
from dspark_stream.engine.captured.graphs import row_ladder, seat_ladder
from dspark_stream.engine.captured.runner import CANDIDATES


class Shape(NamedTuple):
    """A target's sizes, as far as kernels see them."""

    heads: int
    key_heads: int
    head_dim: int
    vocab: int
    gamma: int
    rank: int
    candidates: int
    hidden: int
    inner: int
    taps: int
    normed: bool


SMOLLM2_135M = Shape(9, 3, 64, 49152, 7, 128, CANDIDATES, 576, 1536, 5, False)
QWEN3_4B = Shape(32, 8, 128, 151936, 7, 256, CANDIDATES, 2560, 9728, 5, True)
QWEN3_8B = QWEN3_4B._replace(hidden=4096, inner=12288)
SEATS = 128
"""Streams of the largest captured round."""


def sampling(streams: int, device: torch.device) -> Sampling:
    """Every stream greedy."""
    i, real, n = (torch.zeros(streams, dtype=d, device=device) for d in (torch.int32, torch.float32, torch.int64))
    return Sampling(i, real + 1, i, real + 1, real, n, n, n)


def attention(shape: Shape, streams: int, device: torch.device, dtype: torch.dtype, rows: int) -> None:
    table = table_of([Segment(s * rows, rows, s * 1024, 900 - rows) for s in range(streams)], device)
    q = torch.empty(rows * streams, shape.heads, shape.head_dim, dtype=dtype, device=device)
    k = torch.empty(1024 * streams, shape.key_heads, shape.head_dim, dtype=dtype, device=device)
    for longest, causal, window in ((200, True, None), (40968, True, None), (8200, False, None), (8200, True, 512)):
        bounded = table._replace(longest=longest)
        ragged_attention.attend_table(q, k, k, bounded, scale=0.1, causal=causal, window=window)


def heads(shape: Shape, kind: str, streams: int, device: torch.device, dtype: torch.dtype) -> None:
    v, g, r, c = shape.vocab, shape.gamma, shape.rank, shape.candidates
    inner = {"gated": (r, r), "rnn": (3 * r, 2 * r)}.get(kind)

    def empty(*size: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=of, device=device)

    table = None if kind == "none" else empty(v, r, of=dtype)
    weights = HeadWeights(
        kind, table, table, None if inner is None else empty(*inner, of=dtype), None, None, None,
        None if kind == "none" else empty(r, of=dtype), None, empty(), None,
    )  # fmt: skip
    ids = empty(streams, g, c, of=torch.int32)
    part = None if inner is None else empty(streams, g, inner[0])
    prepared = Prepared(ids, ids, empty(streams, g, c), empty(streams, g), part, empty(streams, g))
    sequential_head.walk(prepared, empty(streams, of=torch.int32), weights, sampling(streams, device))


def round_parts(
    shape: Shape, streams: int, device: torch.device, dtype: torch.dtype, gamma: int, rows: int, logits: int
) -> None:
    """Admission, packing and acceptance of a round; ``logits``: rows of them that are really there."""
    g, c = gamma, shape.candidates if gamma > 1 else 1
    i32 = torch.zeros(streams, dtype=torch.int32, device=device)
    i64, flag = i32.long(), i32.bool()
    base, s = torch.empty(logits, shape.vocab, dtype=dtype, device=device), sampling(streams, device)
    ids = torch.zeros(streams, g, c, dtype=torch.int32, device=device)
    q = torch.empty(streams, g, c, device=device)
    drafts = Drafts(ids[:, :, 0].contiguous(), ids, q, q[:, :, 0].contiguous())
    acceptance.accept(base, i32, i32, drafts, s)
    real = torch.empty(streams, g, device=device)
    rule, sps = torch.zeros(2, dtype=torch.int32, device=device), torch.empty(rows + 1, device=device)
    admission.admit(real, real, flag, flag, rule, sps, rows)
    admission.pack(Admitted(i32, i32, real), drafts.tokens, i32, i64, i64, rows)


def quantised(bits: int, outputs: int, inputs: int, rows: int, device: torch.device, dtype: torch.dtype) -> None:
    groups = inputs // GROUP
    scale = torch.empty(outputs, groups, dtype=torch.float16, device=device)
    kind, width = (torch.int8, inputs) if bits == 8 else (torch.uint8, inputs // 2)
    packed = torch.empty(outputs, width, dtype=kind, device=device)
    x = torch.empty(rows, inputs, dtype=dtype, device=device)
    weight_only.linear(x, Quantised(packed, scale, None if bits == 8 else scale, bits))


def layers(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> None:
    """Norms, rotary embedding and activation between the products of a layer."""

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    layer_parts.rms_norm(empty(1, rows, shape.hidden), empty(shape.hidden), 1e-6)
    layer_parts.add_rms_norm(*[empty(1, rows, shape.hidden)] * 2, empty(shape.hidden), 1e-6)
    layer_parts.silu_mul(*empty(1, rows, 2 * shape.inner).split(shape.inner, -1))
    layer_parts.silu_mul(empty(1, rows, shape.inner), empty(1, rows, shape.inner))
    d, norms = shape.head_dim, [empty(shape.head_dim)] * 2 if shape.normed else []
    wide = empty(rows, shape.heads + 2 * shape.key_heads, d)
    layer_parts.rotate(
        wide[:, : shape.heads], wide[:, shape.heads : -shape.key_heads], empty(rows, d), empty(rows, d), *norms
    )
    q, k = empty(rows, shape.heads, d), empty(rows, shape.key_heads, d)
    layer_parts.rotate(q, k, empty(rows, d), empty(rows, d), *norms)
    if shape.normed:
        layer_parts.rms_norm(k, norms[0], 1e-6)  # of context features


def products(shape: Shape, bits: int, rows: int, device: torch.device) -> None:
    """Every quantised product of a draft: projections, MLP, context features, LM head."""
    q, kv = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    h, inner = shape.hidden, shape.inner
    for outputs, inputs in ((q, h), (kv, h), (h, q), (inner, h), (h, inner), (h, shape.taps * h)):
        quantised(bits, outputs, inputs, rows, device, torch.bfloat16)
    quantised(8, shape.vocab, h, rows, device, torch.bfloat16)


def launch_everything(device: torch.device) -> None:
    """All that captured rounds of 1 … 128 streams launch in bfloat16, every kind of head, plain and drafted, prompts;
    float32 for one shape.

    Variants that differ in nothing that the compiler sees are compiled once.
    """
    for shape, dtype in ((SMOLLM2_135M, torch.bfloat16), (QWEN3_8B, torch.bfloat16), (SMOLLM2_135M, torch.float32)):
        gamma = shape.gamma
        for rows in (*range(1, gamma + 2), 16, 500):
            attention(shape, 1 if rows == 1 else 2, device, dtype, rows)
        for streams in seat_ladder(SEATS) if dtype == torch.bfloat16 else (1, 3):
            round_parts(shape, streams, device, dtype, 1, streams, min(streams, 8))
            for rows in row_ladder(streams, gamma):
                round_parts(shape, streams, device, dtype, gamma, rows, min(rows, 8))
        for kind in ("none", "vanilla", "gated", "rnn"):
            for streams in (1, 16):
                heads(shape, kind, streams, device, dtype)
    for shape in (SMOLLM2_135M, QWEN3_4B, QWEN3_8B):
        for rows in (1, 7, 8, 16, 24, 448):
            layers(shape, rows, device, torch.bfloat16)
            for bits in (8, 4):
                products(shape, bits, rows, device)
