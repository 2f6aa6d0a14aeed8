"""The persistent CUDA kernel of the walk over the whole vocabulary: built once by nvcc, called through ctypes.

Source in csrc/, contract in `reference.full_walk`. The library lies in the user's cache under a hash of source and
flags, as the CPU's does; it holds code for sm_90a (bulk copies) and sm_80, and PTX of sm_80 for what comes after.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.compiling import CompilerError, compile_library, digest, folder
from dspark_kernels.sequential_head.reference import HeadWeights, Walk, walked_whole
from dspark_kernels.streams import Sampling

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc"
ARCHITECTURES = ("arch=compute_90a,code=sm_90a", "arch=compute_80,code=[sm_80,compute_80]")
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-shared", *(f"-gencode={a}" for a in ARCHITECTURES))
RANKS = (32, 64, 128, 256)
MOST_STREAMS = 8


class NoNvccError(Exception):
    """The library cannot be built here: no nvcc, or it failed. The message says which."""


def nvcc() -> str | None:
    """The compiler: $NVCC, else the one in the path or in /usr/local/cuda."""
    return shutil.which(os.environ.get("NVCC") or "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def build(where: Path) -> Path:
    """The library under ``where``, built if it is not there yet.

    Raises:
        NoNvccError: there is no nvcc, or it failed; the message has its words.
    """
    library = where / f"dspark-walk-{digest(SOURCE, FLAGS)}.so"
    if library.exists():
        return library
    found = nvcc()
    if found is None:
        raise NoNvccError("no nvcc was found")
    try:
        return compile_library(library, lambda out: [found, *FLAGS, "-o", str(out), str(SOURCE / "walk.cu")])
    except CompilerError as error:
        raise NoNvccError(str(error)) from error


@cache
def _library() -> ctypes.CDLL | None:
    """The library, or None with one line that says why."""
    try:
        library = ctypes.CDLL(str(build(folder())))
    except (NoNvccError, OSError) as error:
        log.warning("the walk over the whole vocabulary runs on plain torch: %s", error)
        return None
    library.dspark_walk.argtypes = [ctypes.POINTER(_Walk), ctypes.c_void_p]
    library.dspark_error.restype = ctypes.c_char_p
    log.info("the walk over the whole vocabulary runs on the persistent CUDA kernel")
    return library


POINTERS = (
    "base", "w1", "w2", "draft_ids", "confidence_hidden", "confidence_e", "anchor", "mode", "temperature", "seed",
    "round_key", "position", "scores", "tokens", "confidence", "best", "arrived",
)  # fmt: skip


class _Walk(ctypes.Structure):
    """`DsparkWalk` of walk.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in ("streams", "gamma", "vocab", "rank")),
    )


def fits(base: Tensor, weights: HeadWeights) -> bool:
    """Whether the kernel knows this head and these sizes, and is there."""
    return (
        weights.kind == "vanilla"
        and weights.w1 is not None
        and weights.w2 is not None
        and weights.w1.shape[1] in RANKS
        and all(w.dtype == torch.bfloat16 and w.is_contiguous() for w in (weights.w1, weights.w2))
        and base.shape[0] <= MOST_STREAMS
        and _library() is not None
    )


class Arguments(NamedTuple):
    """The tensors of one launch, kept alive until it is done, and its sizes."""

    tensors: dict[str, Tensor | None]
    streams: int
    gamma: int
    vocab: int
    rank: int

    def structure(self) -> _Walk:
        """As walk.cu takes them."""
        pointers = {name: None if t is None else t.data_ptr() for name, t in self.tensors.items()}
        return _Walk(**pointers, streams=self.streams, gamma=self.gamma, vocab=self.vocab, rank=self.rank)


def arguments(base: Tensor, hidden: Tensor, anchor: Tensor, weights: HeadWeights, sampling: Sampling) -> Arguments:
    """What one launch reads and writes; the arguments are `reference.full_walk`'s."""
    assert weights.w1 is not None
    streams, gamma, vocab = base.shape
    device = base.device
    confidence_hidden = None
    if weights.confidence_hidden is not None:
        confidence_hidden = (hidden @ weights.confidence_hidden).float()
        if weights.confidence_bias is not None:
            confidence_hidden = confidence_hidden + weights.confidence_bias.float()
    tensors: dict[str, Tensor | None] = {
        "base": base.float().contiguous(),
        "w1": weights.w1,
        "w2": weights.w2,
        "draft_ids": weights.draft_ids,
        "confidence_hidden": confidence_hidden,
        "confidence_e": None if weights.confidence_e is None else weights.confidence_e.bfloat16(),
        "anchor": anchor.int(),
        "mode": sampling.mode,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "round_key": sampling.round_key,
        "position": sampling.position,
        "scores": torch.empty(streams, gamma, vocab, device=device),
        "tokens": torch.empty(streams, gamma, dtype=torch.int32, device=device),
        "confidence": torch.empty(streams, gamma, device=device),
        "best": torch.empty(gamma * streams, dtype=torch.long, device=device),
        "arrived": torch.empty(1, dtype=torch.int32, device=device),
    }
    return Arguments(tensors, streams, gamma, vocab, weights.w1.shape[1])


def result(call: Arguments, weights: HeadWeights) -> Walk:
    """What a launch has left in its tensors."""
    tokens, scores, confidence = (call.tensors[name] for name in ("tokens", "scores", "confidence"))
    assert tokens is not None
    assert scores is not None
    return walked_whole(tokens, scores, None if call.tensors["confidence_hidden"] is None else confidence, weights)


def full_walk(base: Tensor, hidden: Tensor, anchor: Tensor, weights: HeadWeights, sampling: Sampling) -> Walk:
    """See `reference.full_walk`.

    Raises:
        RuntimeError: CUDA refused the launch; the message has its words.
    """
    library = _library()
    assert library is not None
    call = arguments(base, hidden, anchor, weights, sampling)
    code = library.dspark_walk(ctypes.byref(call.structure()), torch.cuda.current_stream(base.device).cuda_stream)
    if code:
        raise RuntimeError(f"the walk's launch failed: {library.dspark_error(code).decode()}")
    return result(call, weights)
