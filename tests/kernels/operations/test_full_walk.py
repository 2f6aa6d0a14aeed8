"""The walk over the whole vocabulary: the reference against the pruned one, the CUDA kernel against the reference."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dspark_kernels.noise import DRAFT, race_noise, uniforms
from dspark_kernels.noise.reference import signed
from dspark_kernels.sequential_head import cuda, reference
from dspark_kernels.streams import COUPLED, GREEDY, REJECTION
from kernel_cases import random_case, sampling_of, sampling_on, weights_on


def full_case(streams: int, vocab: int, rank: int, dtype: torch.dtype, gamma: int = 5):
    weights, base, _, anchor = random_case("vanilla", streams, gamma, vocab, rank, 8, dtype)
    torch.manual_seed(9)
    return weights, base, torch.randn(streams, gamma, 24).to(dtype), anchor


def test_greedy_and_coupled_are_the_walk_over_all_candidates():
    """Guards against two walks that disagree where they mean the same."""
    sampling = sampling_of([GREEDY, COUPLED, COUPLED, GREEDY])
    weights, base, hidden, anchor = full_case(4, 301, 16, torch.float32)
    whole = reference.full_walk(base, hidden, anchor, weights, sampling)
    pruned = reference.walk(reference.prepare(base, hidden, weights, 301), anchor, weights, sampling)
    assert torch.equal(whole.drafts.tokens, pruned.drafts.tokens)
    torch.testing.assert_close(whole.drafts.q, pruned.drafts.q, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(whole.confidence, pruned.confidence, atol=1e-5, rtol=1e-5)


def test_races_draw_from_q():
    """Guards against noise that is shared between slots or rounds: x_1's shares over 600 rounds are q's."""
    weights, base, hidden, anchor = full_case(1, 6, 16, torch.float32, gamma=2)
    rounds = 600
    n = torch.arange(rounds)
    sampling = sampling_of([REJECTION] * rounds, position=n.tolist(), temperature=[3.0] * rounds)
    sampling = sampling._replace(round_key=sampling.round_key[:1].expand(rounds))
    got = reference.full_walk(
        base.expand(rounds, -1, -1), hidden.expand(rounds, -1, -1), anchor.expand(rounds), weights, sampling
    )
    first, second = got.drafts.tokens.unbind(1)
    expected = got.drafts.q[0, 0] * rounds
    counts = torch.bincount(first.long(), minlength=6)
    assert (((counts - expected) ** 2) / expected).sum() < 20.5  # chi-squared, 5 degrees, p = 0.001
    likely = got.drafts.q[:, 1].gather(1, second.long().unsqueeze(1)).mean()
    assert likely < 0.9  # or the second slot drew nothing at random


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the persistent kernel needs a GPU")
@pytest.mark.parametrize("rank", cuda.RANKS)
@pytest.mark.parametrize(("streams", "vocab"), [(1, 1003), (3, 32001), (8, 4096)])
def test_the_persistent_kernel(device, rank, streams, vocab):
    """Guards against a slice, a barrier or a race that goes wrong: every stream, every slot, every score."""
    sampling = sampling_of(([GREEDY, REJECTION, COUPLED] * 3)[:streams])
    weights, base, hidden, anchor = full_case(streams, vocab, rank, torch.bfloat16)
    expected = reference.full_walk(base, hidden, anchor, weights, sampling)
    weights, args = weights_on(weights, device), [x.to(device) for x in (base, hidden, anchor)]
    assert cuda.fits(args[0], weights)
    got = cuda.full_walk(*args, weights, sampling_on(sampling, device))
    assert torch.equal(got.drafts.tokens.cpu(), expected.drafts.tokens)
    torch.testing.assert_close(got.drafts.q.cpu(), expected.drafts.q, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(got.confidence.cpu(), expected.confidence, atol=2e-2, rtol=2e-2)


CUDA_ALIASING = ("-fno-strict-aliasing",)  # nvcc lets 16 bytes be read as what they hold

EMULATED = """
#define DSPARK_EMULATED
#include "walk.cu"
extern "C" int emulated(const DsparkWalk* w, int blocks, int slice, int kept) {
    const DsparkWalk copy = *w;
    return run_grid(blocks, THREADS, [=] {
        switch (copy.rank) {
            case 32: return walk<4>(copy, slice, kept);
            case 64: return walk<8>(copy, slice, kept);
            case 128: return walk<16>(copy, slice, kept);
            default: return walk<32>(copy, slice, kept);
        }
    });
}
"""


def compiled(folder: Path, name: str, text: str, *flags: str) -> ctypes.CDLL:
    """C++ for this machine, with the kernels' sources in reach."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(text)
    include = [f"-I{cuda.SOURCE}", f"-I{Path(__file__).parents[2]}"]
    flags = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", *flags)
    subprocess.run([compiler, *flags, *include, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    """walk.cu on threads of this CPU (tests/cuda_on_threads.h): everything but its copies to shared memory."""
    return compiled(tmp_path_factory.mktemp("walk"), "walk", EMULATED, "-Wno-unknown-pragmas", *CUDA_ALIASING)


@pytest.mark.parametrize(
    ("rank", "streams", "vocab", "blocks", "kept", "reduced"),
    [(32, 3, 299, 3, 128, False), (64, 2, 130, 2, 32, True), (256, 1, 70, 2, 0, False), (128, 1, 33, 1, 5, False)],
)
def test_the_persistent_kernel_on_threads(emulated, rank, streams, vocab, blocks, kept, reduced):
    """The CUDA source itself without a GPU: slices, shuffles, races, the grid's barrier, rows kept and rows read again.

    Guards against indices that are wrong for some rank, a last slice that is short, a stream that takes another's.
    """
    sampling = sampling_of([GREEDY, REJECTION, COUPLED][-streams:])
    weights, base, hidden, anchor = full_case(streams, vocab, rank, torch.bfloat16, gamma=3)
    if reduced:  # the target has twice the vocabulary of the drafts
        ids = torch.arange(vocab) * 2 + 1
        weights = weights._replace(draft_ids=ids, w1=torch.cat((weights.w1, weights.w1 * 0.5)))
    expected = reference.full_walk(base, hidden, anchor, weights, sampling)
    call = cuda.arguments(base, hidden, anchor, weights, sampling)
    for name in ("scores", "tokens", "confidence", "best", "arrived"):
        call.tensors[name].zero_().share_memory_()
    walk = call.structure()
    slice_rows = (-(-vocab // blocks) + 31) // 32 * 32
    assert emulated.emulated(ctypes.byref(walk), blocks, slice_rows, kept) == 0
    got = cuda.result(call, weights)
    assert torch.equal(got.drafts.tokens, expected.drafts.tokens)
    torch.testing.assert_close(got.drafts.q, expected.drafts.q, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(got.confidence, expected.confidence, atol=2e-2, rtol=2e-2)


HOST = """
#include "noise.h"
extern "C" double host_uniform(uint64_t k, uint64_t p, int w, uint64_t i) {
    return dspark::uniform(k, p, static_cast<dspark::Purpose>(w), i);
}
extern "C" float host_noise(uint64_t k, uint64_t p, int w, uint64_t i) {
    return dspark::race_noise(k, p, static_cast<dspark::Purpose>(w), i);
}
extern "C" uint64_t host_packed(float s, uint32_t t) { return dspark::packed(s, t); }
extern "C" uint32_t host_token(uint64_t b) { return dspark::packed_token(b); }
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    """The kernel's header, built for this machine."""
    loaded = compiled(tmp_path_factory.mktemp("noise"), "noise", HOST, "-Wall", "-Werror")
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    loaded.host_uniform.argtypes, loaded.host_uniform.restype = [u64, u64, ctypes.c_int, u64], ctypes.c_double
    loaded.host_noise.argtypes, loaded.host_noise.restype = [u64, u64, ctypes.c_int, u64], ctypes.c_float
    loaded.host_packed.argtypes, loaded.host_packed.restype = [ctypes.c_float, u32], u64
    loaded.host_token.argtypes, loaded.host_token.restype = [u64], u32
    return loaded


def test_the_kernels_noise_on_the_host(host):
    """Guards against CUDA code with a Philox of its own: the header, built for this machine, draws what numpy draws."""
    for key in (0, 7, 2**63, 2**64 - 1):
        for position in (0, 123456):
            index = torch.arange(5000, 5064)
            args = torch.tensor(signed(key)), torch.tensor(position)
            expected = uniforms(*args, DRAFT, index)
            assert [host.host_uniform(key, position, DRAFT, i) for i in index.tolist()] == expected.tolist()
            got = torch.tensor([host.host_noise(key, position, DRAFT, i) for i in index.tolist()])
            torch.testing.assert_close(got, race_noise(*args, index, DRAFT), atol=2e-6, rtol=2e-6)


def test_packed_scores_sort_as_scores_do(host):
    """Guards against a maximum that prefers the wrong token: order of scores, and among equals the lower token."""
    scores = [-math.inf, -1e30, -2.5, -1e-40, 0.0, 1e-40, 0.3, 7.0, 1e30, math.inf]
    numbers = [host.host_packed(s, 5) for s in scores]
    assert numbers == sorted(set(numbers))
    assert host.host_packed(0.3, 4) > host.host_packed(0.3, 5)
    assert min(numbers) > 0
    assert [host.host_token(host.host_packed(1.5, t)) for t in (0, 1, 151935)] == [0, 1, 151935]
