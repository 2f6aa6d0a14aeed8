"""Launch every kernel once in shapes that people have: SmolLM2-135M and Qwen3-8B with their drafters."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dspark_kernels.acceptance import triton as acceptance
from dspark_kernels.admission import triton as admission
from dspark_kernels.admission.reference import Admitted
from dspark_kernels.ragged_attention import triton as ragged_attention
from dspark_kernels.ragged_attention.reference import Segment, table_of
from dspark_kernels.sequential_head import triton as sequential_head
from dspark_kernels.sequential_head.reference import HeadWeights, Prepared
from dspark_kernels.streams import Drafts, Sampling
from dspark_kernels.weight_only import triton as weight_only
from dspark_kernels.weight_only.reference import GROUP, Quantised


class Shape(NamedTuple):
    """A target's sizes, as far as kernels see them."""

    heads: int
    key_heads: int
    head_dim: int
    vocab: int
    gamma: int
    rank: int
    candidates: int


SMOLLM2_135M = Shape(9, 3, 64, 49152, 7, 64, 64)
QWEN3_8B = Shape(32, 8, 128, 151936, 7, 256, 128)


def sampling(streams: int, device: torch.device) -> Sampling:
    """Every stream greedy."""
    i, real, n = (torch.zeros(streams, dtype=d, device=device) for d in (torch.int32, torch.float32, torch.int64))
    return Sampling(i, real + 1, i, real + 1, real, n, n, n)


def attention(shape: Shape, streams: int, device: torch.device, dtype: torch.dtype, prompt: int = 0) -> None:
    rows = prompt or shape.gamma + 1
    table = table_of([Segment(s * rows, rows, s * 1024, 900 - rows) for s in range(streams)], device)
    q = torch.empty(rows * streams, shape.heads, shape.head_dim, dtype=dtype, device=device)
    k = torch.empty(1024 * streams, shape.key_heads, shape.head_dim, dtype=dtype, device=device)
    for longest, causal, window in ((200, True, None), (1024, True, None), (1024, False, None), (1024, True, 512)):
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


def round_parts(shape: Shape, streams: int, device: torch.device, dtype: torch.dtype) -> None:
    g, c, rows = shape.gamma, shape.candidates, streams * (shape.gamma + 1)
    i32 = torch.zeros(streams, dtype=torch.int32, device=device)
    i64, flag = i32.long(), i32.bool()
    logits, s = torch.empty(rows, shape.vocab, dtype=dtype, device=device), sampling(streams, device)
    ids = torch.zeros(streams, g, c, dtype=torch.int32, device=device)
    q = torch.empty(streams, g, c, device=device)
    drafts = Drafts(ids[:, :, 0].contiguous(), ids, q, q[:, :, 0].contiguous())
    acceptance.accept(logits, i32, i32, drafts, s)
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


def launch_everything(device: torch.device) -> None:
    """Every kernel, each kind of head, one stream and several, bfloat16 and float32."""
    for shape, dtype in ((SMOLLM2_135M, torch.bfloat16), (QWEN3_8B, torch.bfloat16), (SMOLLM2_135M, torch.float32)):
        attention(shape, 2, device, dtype)
        attention(shape, 2, device, dtype, prompt=500)
        for streams in (1, 16):
            round_parts(shape, streams, device, dtype)
        for kind in ("none", "vanilla", "gated", "rnn"):
            heads(shape, kind, 1, device, dtype)
    round_parts(QWEN3_8B, 128, device, torch.bfloat16)
    for bits in (8, 4):
        quantised(bits, 4096, 12288, 7, device, torch.bfloat16)
        quantised(bits, 576, 1536, 1, device, torch.bfloat16)
