"""The CPU's integer kernels against their plain-torch contract, on every instruction set that this machine has.

`DSPARK_CPU_SANITIZE=1` runs the same tests on a build with address and undefined-behaviour sanitizers; the last test
does that in a process of its own.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch

from dspark_kernels.cpu import (
    Context,
    Head,
    Kind,
    LayerWeights,
    Llama,
    PackedMatrix,
    Pass,
    Room,
    Rooms,
    Rope,
    Source,
    Store,
    Table,
    Weights,
    noise_rows,
    race,
    sampling_rows,
    supported_isas,
)
from dspark_kernels.cpu import build as building
from dspark_kernels.cpu.reference import LayerReference, LlamaReference, product, rms_norm
from dspark_kernels.drawing.reference import distributions, draw, residual
from dspark_stream.decoding.accept import rejection
from dspark_stream.decoding.draft import Block
from dspark_stream.decoding.noise import RoundUniforms, token_exponentials
from dspark_stream.models.native.distributions import NativeDistributions
from dspark_stream.models.protocols import Draw
from dspark_stream.models.torch.distributions import Dense
from dspark_stream.models.torch.walk import walk

SANITIZE = os.environ.get("DSPARK_CPU_SANITIZE") == "1"
"""Then less is done of everything: what a sanitizer looks for shows the first time, and each step takes far longer."""
pytestmark = pytest.mark.skipif(building.compiler() is None, reason="no C++ compiler: apt-get install g++")

FORMATS = {source: gguf.GGMLQuantizationType(source) for source in Source if source != Source.F32}


@pytest.fixture(scope="module", params=supported_isas())
def context(request):
    return Context(2, request.param, sanitize=SANITIZE)


def random(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


GROUP = 32
FLOAT_KINDS = [kind for kind in Kind if kind.block == GROUP]
"""What floats are rounded to; the others hold GGUF's blocks of 256 alone."""


def packed(context, weights, kind=Kind.EIGHT):
    return PackedMatrix(context, *weights.shape, kind).pack(weights, Source.F32)


def of_any_kind(context, outputs, inputs, kind, seed=0, scale=1.0):
    """A random matrix: of floats, or of blocks whose weights are about as large."""
    if kind in FLOAT_KINDS:
        return packed(context, random(outputs, inputs, seed=seed, scale=scale), kind)
    source = next(s for s in FORMATS if s.kind == kind)
    blocks = some_blocks(source, outputs, inputs, seed, scale)
    return PackedMatrix(context, outputs, inputs, kind).pack(blocks, source)


def dequantised(matrix):
    return torch.from_numpy(matrix.rows(range(matrix.outputs)))


# --- matrices ------------------------------------------------------------------------------------------------


def some_blocks(source, rows, inputs, seed=0, scale=10.0):
    """Blocks with every quant, scales of moderate size: the library writes some formats only, but reads them all."""
    rng = np.random.default_rng((int(source), seed))
    blocks = rng.integers(0, 256, (rows * inputs // source.block, source.nbytes(source.block)), dtype=np.uint8)
    scales = {Source.Q4_1: (0, 2), Source.Q5_1: (0, 2), Source.Q4_K: (0, 2), Source.Q5_K: (0, 2), Source.Q6_K: (208,)}
    for at in scales.get(source, (0,)):
        halves = (rng.uniform(0.5, 1.5, len(blocks)) * 0.001 * scale).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def least_of(blocks, source):
    """What each weight of a K block with minima has taken off [rows, inputs]."""
    parts = blocks.reshape(-1, source.nbytes(source.block))
    by = parts[:, 2:4].copy().view(np.float16).astype(np.float32)
    _, least = gguf.quants.Q4_K.get_scale_min(parts[:, 4:16].copy())
    return np.repeat(by * least.reshape(len(parts), 8), 32, axis=1).reshape(len(blocks), -1)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("shape", [(16, 256), (1, 256), (40, 512), (33, 256)])
def test_blocks_are_unpacked_as_the_formats_library_does(context, source, shape):
    blocks = some_blocks(source, *shape)
    matrix = PackedMatrix(context, *shape, source.kind).pack(blocks, source)
    want, got = gguf.quants.dequantize(blocks, FORMATS[source]), matrix.rows(range(shape[0]))
    if source == Source.Q5_K:  # scales, there products of two numbers, are halves here; each rounds by 2^-11 at most
        least = least_of(blocks, source)
        assert (np.abs(got - want) <= 1.01 * 2**-11 * (np.abs(want + least) + least)).all()
    elif source == Source.Q4_K:  # the library adds in another order
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("source", Source)
def test_rows_of_a_file_are_those_of_the_formats_library(context, tmp_path, source):
    rows, inputs = 20, 512
    blocks = random(rows, inputs) if source == Source.F32 else some_blocks(source, rows, inputs)
    path = tmp_path / "table"
    path.write_bytes(b"x" * 96 + blocks.tobytes() + b"y" * 8)
    table = Table.in_file(context, rows, inputs, source, path, 96)
    wanted = [19, 0, 7, 7]
    want = blocks if source == Source.F32 else gguf.quants.dequantize(blocks, FORMATS[source])
    np.testing.assert_allclose(table.rows(wanted), want[wanted], rtol=2e-6, atol=2e-6 * np.abs(want).max())
    with pytest.raises(ValueError, match="outside"):
        table.rows([20])
    with pytest.raises(ValueError, match="past the end"):
        Table.in_file(context, rows, inputs, source, path, 112)
    path.rename(tmp_path / "elsewhere")  # what is open stays
    np.testing.assert_array_equal(table.rows([3]), table.rows([3]))
    with (tmp_path / "elsewhere").open("r+b") as file:
        file.truncate(96 + blocks.nbytes // 2)
    assert table.rows([0]).shape == (1, inputs)
    with pytest.raises(ValueError, match="cut short"):
        table.rows([19])


def test_a_matrix_holds_what_its_kind_is_made_for(context):
    for kind in Kind:  # quants of another kind would have to be rounded again
        for source in FORMATS:
            if source.kind != kind:
                with pytest.raises(ValueError, match=source.name):
                    PackedMatrix(context, 16, 256, kind).pack(some_blocks(source, 16, 256), source)
    with pytest.raises(ValueError, match="256"):
        PackedMatrix(context, 16, 96, Kind.FOUR_K)
    with pytest.raises(ValueError, match="F32"):
        packed(context, random(16, 256), Kind.SIX_K)
    with pytest.raises(ValueError, match="Q5_K"):
        PackedMatrix(context, 16, 96, Kind.FIVE_M).pack(some_blocks(Source.Q5_K, 16, 256), Source.Q5_K)


def step_of(kind, weights):
    """How far apart neighbouring quants of each group of weights [n, group] are, with scales that just reach its ends:
    [n, 1]. Around zero the largest number of all is at one end, whichever sign it has.
    """
    bits = {Kind.EIGHT: 8, Kind.FIVE: 5, Kind.FIVE_M: 5}.get(kind, 4)
    if kind in (Kind.FOUR_M, Kind.FIVE_M):
        return np.ptp(weights, axis=-1, keepdims=True) / (2**bits - 1)
    return np.abs(weights).max(-1, keepdims=True) / (127 if kind == Kind.EIGHT else 2 ** (bits - 1))


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_floats_are_rounded_to_the_kinds_steps(context, kind):
    weights = random(64, 96, seed=int(kind))
    weights[:20] *= 100.0
    weights[20:40] = np.abs(weights[20:40])  # all of one sign: their largest must not be cut off
    weights[40:50] = -np.abs(weights[40:50])
    got, group = packed(context, weights, kind).rows(range(64)), GROUP
    lost = np.square(got - weights).reshape(-1, group)
    step = step_of(kind, weights.reshape(-1, group))
    assert (lost.mean(-1, keepdims=True) <= 1.02 * np.square(step) / 4).all()  # what is furthest off is off by half
    assert (lost.mean(-1, keepdims=True) / np.square(step)).mean() < 1.1 / 12  # as if spread evenly between quants
    if kind == Kind.EIGHT:
        assert (np.sqrt(lost) <= 0.52 * step + 127 * 2**-11 * step).all()


@pytest.mark.parametrize("kind", [Kind.FOUR_M, Kind.FIVE_M])
def test_floats_lose_less_than_between_their_own_ends(context, kind):
    most = 2 ** (4 if kind == Kind.FOUR_M else 5) - 1
    weights = random(64, 64)
    weights[:32] = np.sign(weights[:32]) * np.abs(weights[:32]) ** 1.5  # long tails
    groups = weights.reshape(64, 2, 32)
    low, step = groups.min(-1, keepdims=True), np.ptp(groups, axis=-1, keepdims=True) / most
    by_ends = np.square(np.round((groups - low) / step) * step + low - groups).sum(-1)
    lost = np.square(packed(context, weights, kind).rows(range(64)) - weights).reshape(64, 2, 32).sum(-1)
    assert (lost <= 1.01 * by_ends + 1e-4).all()
    assert lost.mean() < (0.9 if kind == Kind.FOUR_M else 0.95) * by_ends.mean()


@pytest.mark.parametrize(
    "weights", [np.zeros((3, 32)), np.full((3, 32), 5.0), np.full((3, 32), -5.0), np.full((3, 32), -1e-9)]
)
@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_flat_groups_survive(context, kind, weights):
    np.testing.assert_allclose(packed(context, weights.astype(np.float32), kind).rows([0, 2]), weights[:2], rtol=4e-3,
                               atol=1e-7)  # fmt: skip


def test_rows_can_be_put_in_another_order(context):
    weights = random(12, 32)
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    whole = PackedMatrix(context, 12, 32, Kind.EIGHT).pack(blocks, Source.Q8_0)
    order = np.array([5, 0, 11, 3, 2, 1, 4, 6, 7, 8], dtype=np.int32)
    rows = whole.rows(range(12))
    ordered = PackedMatrix(context, 10, 32, Kind.EIGHT).pack(blocks, Source.Q8_0, order)
    np.testing.assert_array_equal(ordered.rows(range(10)), rows[order])
    np.testing.assert_array_equal(whole.take([7, 7, 0]).rows(range(3)), rows[[7, 7, 0]])


def test_rooms_are_used_again_when_nobody_has_them():
    """Guards against taps that the next pass writes over, and against fresh memory for every pass."""
    rooms = Rooms()
    kept = [rooms.get(n, 8) for n in (3, 4, 3)]
    places = {array.ctypes.data for array in kept}
    assert len(places) == 3
    assert rooms.address == kept[-1].ctypes.data
    for i, array in enumerate(kept):
        array[:] = i
    view, tensor = kept[0][1:], torch.from_numpy(kept[1])[2:]
    del kept[:2]
    del array
    others = [rooms.get(4, 8) for _ in range(3)]
    for array in others:
        array[:] = 9
    assert (view == 0).all()
    assert (tensor == 1).all()
    assert (kept[0] == 2).all()
    del view, tensor
    assert {rooms.get(4, 8).ctypes.data, rooms.address} <= places
    assert rooms.get(0, 8).shape == (0, 8)


def test_rooms_may_be_let_go_of_by_any_thread():
    """Guards against a pass that fails, or gets what somebody has, because another thread let go of taps meanwhile."""
    rooms, stop, held = Rooms(), threading.Event(), []

    def let_go():
        while not stop.is_set():
            with contextlib.suppress(IndexError):
                held.pop()

    others = [threading.Thread(target=let_go) for _ in range(2)]
    mine: list[tuple[int, np.ndarray]] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in others:
            thread.start()
        for i in range(5_000):
            held.append(rooms.get(1 << i % 12, 512))
            mine.append((i, rooms.get(1 << i % 5, 512)))
            mine[-1][1][:] = i
            if len(mine) > 8:
                number, array = mine.pop(0)
                assert (array == number).all()
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in others:
            thread.join()


def test_rooms_keep_no_more_than_they_may():
    """Guards against a service that holds for ever what its busiest minute took, or what is seldom used."""
    rooms = Rooms()
    many = [rooms.get(1 << n, 2**14) for n in range(8) for _ in range(9)]
    assert sum(array.nbytes for array in many) > 2 * Rooms.KEPT
    del many
    kept = sum(memory.nbytes for free in rooms._free.values() for memory, _ in free)
    assert Rooms.KEPT / 2 < kept <= Rooms.KEPT
    small = rooms.get(5, 64)
    place = rooms.address
    del small
    assert rooms.get(5, 64).ctypes.data == place


def test_what_the_machine_can_do_is_measured(context):
    assert context.library.multiply_rate(context.handle, 100) > 0


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (7, 64), (50, 160), (130, 576)])
def test_product_is_the_reference_and_rows_ignore_their_company(context, kind, outputs, inputs):
    inputs = -(-inputs // kind.block) * kind.block
    matrix = of_any_kind(context, outputs, inputs, kind)
    x = random(40, inputs, seed=1)
    want = product(torch.from_numpy(x), dequantised(matrix)).numpy()
    alone = [matrix.product(x[i : i + 1])[0] for i in range(18)]
    for rows in (*range(1, 18), 32, 40):
        out = np.full((rows, outputs), np.nan, dtype=np.float32)
        matrix.product(x[:rows], out)
        np.testing.assert_allclose(out, want[:rows], rtol=1e-4, atol=2e-5 * inputs)
        for i in range(min(rows, 18)):  # to the bit: who else is in the batch makes no difference
            assert (out[i] == alone[i]).all()


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 64), (50, 160), (1300, 32)])
def test_the_largest_product_of_each_row(context, outputs, inputs):
    matrix = packed(context, np.concatenate([random(outputs - 1, inputs), random(1, inputs, seed=3)]))
    for rows in (1, 3, 17, 40):
        x = random(rows, inputs, seed=rows)
        assert (matrix.argmax(x) == matrix.product(x).argmax(-1)).all()
    same = packed(context, np.repeat(random(1, inputs), outputs, 0))
    assert (same.argmax(random(5, inputs)) == 0).all()  # of equal ones the first
    assert (same.argmax(np.full((2, inputs), np.nan, np.float32)) == -1).all()  # none, and not one made up


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-3, 1e4, 1e30])
def test_extreme_activations(context, scale):
    matrix = packed(context, random(32, 64))
    x = random(3, 64, seed=2)
    x[0], x[1, :32] = 0.0, 0.0
    x[2, 5] = 1000.0
    x = (x * np.float32(scale)).astype(np.float32)
    want = product(torch.from_numpy(x).double(), dequantised(matrix).double()).numpy()
    np.testing.assert_allclose(matrix.product(x), want, rtol=1e-3, atol=1e-4 * scale * 1000 + 1e-28)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(
    ("source", "most", "least"),
    [(Source.Q4_0, 7, -8), (Source.Q4_1, 15, 0), (Source.Q5_0, 15, -16), (Source.Q5_1, 31, 0), (Source.Q6_K, 31, -32),
     (Source.Q8_0, 127, -128)],
)  # fmt: skip
def test_all_quants_at_their_ends(context, rows, source, most, least):
    """The largest products of both signs, side by side: nothing may saturate on the way."""
    inputs = source.block
    blocks = np.zeros((16, source.nbytes(inputs)), dtype=np.uint8)
    header = {Source.Q4_1: 4, Source.Q5_1: 4, Source.Q6_K: 0}.get(source, 2)
    at = 208 if source == Source.Q6_K else 0
    blocks[:8, header:], blocks[8:, header:] = (127, 128) if source == Source.Q8_0 else (255, 0)  # 128 is -128
    blocks[:, 192:208] = 1  # the scales of Q6_K
    blocks[:, at : at + 2] = np.frombuffer(np.float16(1.0).tobytes(), dtype=np.uint8)
    matrix = PackedMatrix(context, 16, inputs, source.kind).pack(blocks, source)
    sign = np.where(np.arange(rows) % 2, -1.0, 1.0).astype(np.float32)[:, None]
    want = np.array([[most] * 8 + [least] * 8]) * 127.0 * inputs
    np.testing.assert_allclose(matrix.product(np.repeat(127.0 * sign, inputs, axis=1)), want * sign, rtol=1e-6)


@pytest.mark.parametrize("kind", FLOAT_KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_weights_that_are_no_numbers_stay_so(context, kind, bad):
    """Guards against damage that is rounded away: a channel of zeros would be an answer that nobody sees is wrong."""
    weights = random(32, 256)
    weights[5, 70] = bad
    matrix, x = packed(context, weights, kind), random(3, 256, seed=1)
    out = matrix.product(x)
    assert (matrix.argmax(x) == -1).all()
    assert np.isnan(out[:, 5]).all()
    assert np.isfinite(np.delete(out, 5, 1)).all()


def test_not_a_number_stays_in_its_row(context):
    matrix = packed(context, random(16, 64))
    x = random(3, 64)
    x[1, 3] = np.nan
    alone = matrix.product(x[[0, 2]])
    assert (matrix.product(x)[[0, 2]] == alone).all()


def test_sizes_that_do_not_fit_are_refused(context):
    with pytest.raises(ValueError, match="divide by 32"):
        PackedMatrix(context, 4, 33, Kind.EIGHT)
    matrix = PackedMatrix(context, 4, 32, Kind.EIGHT)
    with pytest.raises(ValueError, match="Q8_0"):
        PackedMatrix(context, 4, 32, Kind.FOUR_M).pack(np.zeros((4, 34), dtype=np.uint8), Source.Q8_0)
    with pytest.raises(ValueError, match="need 136"):
        matrix.pack(np.zeros(135, dtype=np.uint8), Source.Q8_0)
    with pytest.raises(ValueError, match="outside"):
        matrix.rows([4])
    with pytest.raises(ValueError, match="shape"):
        matrix.product(np.zeros((2, 64), dtype=np.float32))


class Sampling(NamedTuple):
    """As `sampling_rows` takes it; temperature 0 takes the greatest."""

    temperature: float
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0


def some_sampling(generator, rows, sampled, cuts=True):
    """Sampling of some rows, a share of them at a temperature above 0, of those most with something cut off."""
    by = [
        Sampling(
            float(generator.uniform(0.3, 2)),
            float(generator.choice([1.0, 0.9, 0.5])) if cuts else 1.0,
            float(generator.choice([0.0, 0.05])) if cuts else 0.0,
            int(generator.choice([0, 7, 30])) if cuts else 0,
        )
        for _ in range(rows)
    ]
    return [s if u < sampled else Sampling(0.0) for s, u in zip(by, generator.random(rows), strict=True)]


def rows_of(sampling):
    return sampling_rows([tuple(by) for by in sampling])


def at(*temperatures):
    return rows_of([Sampling(t) for t in temperatures])


# --- layers --------------------------------------------------------------------------------------------------


def rope(size, base=1000.0, amplitude=1.0):
    return Rope(base ** -(np.arange(size // 2) / (size // 2)), amplitude)


def tables(rope, positions):
    angles = np.arange(positions)[:, None] * rope.frequencies
    return [torch.from_numpy((rope.amplitude * turn(angles)).astype(np.float32)) for turn in (np.cos, np.sin)]


def models(
    context,
    *,
    heads,
    kv_heads,
    size,
    hidden,
    inner,
    layers,
    norms=False,
    bias=False,
    sandwich=False,
    gelu=False,
    windows=(0,),
    ropes=1,
    score_scale=None,
    seed=0,
):
    """The same random model on the kernels and in plain torch; its matrices are of all kinds in turn."""
    numbers, kinds = iter(range(seed * 1000, seed * 1000 + 999)), itertools.cycle(FLOAT_KINDS)

    def matrix(outputs, inputs):
        return packed(context, random(outputs, inputs, seed=next(numbers), scale=inputs**-0.5), next(kinds))

    def norm(width, there=True):
        return 1 + random(width, seed=next(numbers), scale=0.1) if there else None

    native, plain = [], []
    for i in range(layers):
        width, kv = heads * size, kv_heads * size
        parts = [matrix(width, hidden), matrix(kv, hidden), matrix(kv, hidden), matrix(hidden, width),
                 matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner)]  # fmt: skip
        vectors = [norm(hidden), norm(hidden), norm(size, norms), norm(size, norms),
                   random(width + 2 * kv, seed=next(numbers)) if bias else None,
                   norm(hidden, sandwich), norm(hidden, sandwich)]  # fmt: skip
        places = windows[i % len(windows)], i % ropes
        plain.append(
            LayerReference(
                *map(dequantised, parts), *(None if v is None else torch.from_numpy(v) for v in vectors), *places
            )
        )
        native.append(LayerWeights(*parts, *vectors, *places))
    final, turns = norm(hidden), [rope(size, 1000.0 * 10**i, 1.0 + 0.1 * i) for i in range(ropes)]
    options = {"heads": heads, "kv_heads": kv_heads, "eps": 1e-5, "score_scale": score_scale, "gelu": gelu}
    llama = Llama(context, final_norm=final, ropes=turns, positions=128, layers=native, **options)

    def reference():
        turned = [tables(turn, 128) for turn in turns]
        return LlamaReference(plain, torch.from_numpy(final), turned, bfloat=context.kv_bfloat, **options)

    return llama, reference


SHAPES = {
    "one key head": {"heads": 3, "kv_heads": 1, "size": 32, "hidden": 96, "inner": 160, "layers": 2},
    "SmolLM2": {"heads": 9, "kv_heads": 3, "size": 64, "hidden": 576, "inner": 192, "layers": 1},
    "all heads": {"heads": 2, "kv_heads": 2, "size": 32, "hidden": 64, "inner": 96, "layers": 3},
    "20 query heads": {"heads": 20, "kv_heads": 1, "size": 32, "hidden": 64, "inner": 64, "layers": 1},
    "four to a key": {"heads": 8, "kv_heads": 2, "size": 64, "hidden": 64, "inner": 64, "layers": 1},
    "size 96": {"heads": 2, "kv_heads": 1, "size": 96, "hidden": 64, "inner": 64, "layers": 1},
    "Qwen2": {"heads": 6, "kv_heads": 2, "size": 64, "hidden": 96, "inner": 64, "layers": 2, "bias": True},
    "Qwen3": {"heads": 10, "kv_heads": 2, "size": 128, "hidden": 64, "inner": 64, "layers": 1, "norms": True},
    "Gemma 3": {"heads": 4, "kv_heads": 1, "size": 256, "hidden": 96, "inner": 160, "layers": 3, "norms": True,
                "sandwich": True, "gelu": True, "windows": (21, 32, 0), "ropes": 2, "score_scale": 0.08},
    "one window": {"heads": 3, "kv_heads": 1, "size": 32, "hidden": 64, "inner": 64, "layers": 1, "windows": (1,)},
}  # fmt: skip


def forward(llama, x, start, slot, store, taps=(), visible=None, begin=None):
    """One stream's rows at positions from ``start`` on."""
    position = np.arange(start, start + len(x), dtype=np.int32)
    first = np.full(len(x), slot, dtype=np.int32)
    at = first + (position % store.ring if store.ring else position)
    seen = position + 1 if visible is None else np.full(len(x), visible, dtype=np.int32)
    out, kept = x.copy(), np.full((len(x), len(taps) * x.shape[1]), np.nan, dtype=np.float32)
    llama.forward(out, Pass(position, at, first, seen, begin), store, np.array(taps, dtype=np.int32), kept)
    return out, kept


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_layers_are_the_references(context, shape):
    llama, reference = models(context, **shape)
    hidden = shape["hidden"]
    store = Store.zeros(shape["layers"], 256, shape["kv_heads"], shape["size"])
    plain = reference()
    taps = list(range(shape["layers"] - 1))
    for start, count in ((0, 19), (19, 1), (20, 5), (25, 17), (42, 25 if SANITIZE else 71)):
        x = random(count, hidden, seed=start)
        out, kept = forward(llama, x, start, 32, store, taps)
        positions = torch.arange(start, start + count)
        want, outputs = plain.forward(torch.from_numpy(x), positions, positions + 1)
        # An activation that rounds to the other side of a tie moves what comes after it by a hundredth; where none
        # does the two agree to the last bits, which after one layer most rows do.
        error = np.abs(out - want.numpy())
        assert error.mean() < 1e-2
        assert error.max() < 0.2
        if start == 0:
            first = np.abs(kept[:, :hidden] - outputs[0].numpy()) if taps else error
            assert np.median(first) < 3e-5
        for at, layer in enumerate(taps):
            part = kept[:, at * hidden : (at + 1) * hidden]
            assert np.abs(part - outputs[layer].numpy()).mean() < 2e-2


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_row_does_not_know_its_neighbours(context, shape):
    """To the bit: one by one, in chunks, and with strangers in the batch."""
    llama, _ = models(context, **shape)
    rows = random(40, shape["hidden"], seed=7)
    strangers = random(11, shape["hidden"], seed=8)

    def new_store():
        return Store.zeros(shape["layers"], 256, shape["kv_heads"], shape["size"])

    whole, _ = forward(llama, rows, 0, 16, new_store())
    for sizes in ([1] * (4 if SANITIZE else 40), [3, 17, 20], [16, 16, 8]):
        store, at = new_store(), 0
        for size in sizes:
            out, _ = forward(llama, rows[at : at + size], at, 16, store)
            assert (out == whole[at : at + size]).all()
            at += size
    store = new_store()
    forward(llama, rows[:30], 0, 16, store)
    x = np.concatenate((strangers, rows[30:], strangers[:3]))
    position = np.concatenate((np.arange(11), np.arange(30, 40), np.arange(11, 14))).astype(np.int32)
    first = np.array([96] * 11 + [16] * 10 + [96] * 3, dtype=np.int32)
    llama.forward(x, Pass(position, first + position, first, position + 1), store, np.empty(0, np.int32),
                  np.empty((24, 0), np.float32))  # fmt: skip
    assert (x[11:21] == whole[30:]).all()


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_pass_in_one_call_is_its_parts(context, scale):
    """Embeddings, layers, taps (the embedding's, too), and logits or best tokens, of all rows or of some."""
    llama, _ = models(context, **SHAPES["all heads"])
    embedding, lm_head = (
        Table.of(packed(context, random(50, 64, seed=1))),
        packed(context, random(50, 64, seed=2), Kind.FIVE),
    )
    streams = [(16, 0, [3, 49, 7]), (96, 0, [0]), (48, 5, [9, 9])]
    where = [n for slot, start, ids in streams for n in (slot, start, len(ids))]
    ids = [i for _, _, some in streams for i in some]
    first = np.array([slot for slot, _, some in streams for _ in some], dtype=np.int32)
    position = np.concatenate([np.arange(start, start + len(some)) for _, start, some in streams]).astype(np.int32)
    stores = [Store.zeros(3, 256, 2, 32) for _ in range(2)]
    x, tapped = embedding.rows(ids) * np.float32(scale), np.empty((6, 2 * 64), dtype=np.float32)
    layers, room = np.array([-1, 0, 1], dtype=np.int32), Room()
    before = x.copy()
    llama.forward(x, Pass(position, first + position, first, position + 1), stores[0], layers[1:], tapped)
    for wanted in (None, [2, 5]):
        logits = lm_head.product(x if wanted is None else x[wanted])
        taps, got = llama.run(embedding, lm_head, where, ids, stores[1].place, layers, room, wanted, Room(), scale)
        assert (taps == np.concatenate((before, tapped), axis=1)).all()
        assert (got == logits).all()
        _, best = llama.run(embedding, lm_head, where, ids, stores[1].place, layers, room, wanted, None, scale)
        assert best.tolist() == logits.argmax(-1).tolist()
    assert (stores[0].keys == stores[1].keys).all()
    assert (stores[0].values == stores[1].values).all()
    _, none = llama.run(embedding, lm_head, where, ids, stores[1].place, layers, room, [])
    assert len(none) == 0


@pytest.mark.parametrize(("scale", "window"), [(1.0, 0), (8.0, 3)])
@pytest.mark.parametrize("sampled", [0, 0.5, 1], ids=["greedy", "mixed", "sampled"])
def test_a_draft_in_one_call_is_its_parts(context, sampled, scale, window):
    llama, _ = models(context, **SHAPES["all heads"])
    generator = np.random.default_rng(3)
    embedding, lm_head = Table.of(packed(context, random(50, 64, seed=1))), packed(context, random(40, 64, seed=2))
    ids = np.sort(generator.permutation(50)[:40]).astype(np.int32)
    w1, w2 = random(50, 32, seed=3).astype(np.float16), packed(context, random(40, 32, seed=4))
    head = Head(w1, w2, random(64 + 32, seed=5), 0.5, ids, vocabulary=40, hidden_size=64)
    room, mask = Room(), 7
    for streams, gamma in ((1, 1), (3, 4), (2, 3), (17, 2)):  # the room grows, and is used again
        anchors = generator.integers(0, 50, streams).astype(np.int32)
        start = generator.integers(0, 8, streams).astype(np.int32)
        slot = (16 * np.arange(streams)).astype(np.int32)
        sampling = some_sampling(generator, streams, sampled)
        uniforms = generator.random((streams, gamma))
        stores = [Store.zeros(3, 16 * 17, 2, 32) for _ in range(2)]
        x = embedding.rows([t for anchor in anchors.tolist() for t in (anchor, *[mask] * (gamma - 1))])
        x *= np.float32(scale)
        first, position = np.repeat(slot, gamma), np.repeat(start, gamma) + np.tile(np.arange(gamma), streams)
        position = position.astype(np.int32)
        begin = np.repeat(np.maximum(start - window, 0), gamma) if window else None
        llama.forward(x, Pass(position, first + position, first, np.repeat(start, gamma) + gamma, begin), stores[0],
                      np.empty(0, np.int32), np.empty((len(x), 0), np.float32))  # fmt: skip
        base = lm_head.product(x).reshape(streams, gamma, 40)
        noise = noise_rows([(r, 5 if r % 2 else -1) for r in range(streams)])
        want = head.walk(context, base, x.reshape(streams, gamma, 64), anchors, rows_of(sampling), uniforms, noise)
        where = [n for r in range(streams) for n in (int(slot[r]), int(start[r]), gamma)]
        got = llama.draft(embedding, lm_head, head, mask, gamma, where, anchors.tolist(), stores[1].place, room,
                          rows_of(sampling), uniforms, noise, scale, window)  # fmt: skip
        for one, other in zip(got[:3], want[:3], strict=True):
            np.testing.assert_array_equal(one, other)
        assert (stores[0].keys == stores[1].keys).all()
        assert (got.weights is None) == (want.weights is None)
        if got.weights is not None:
            np.testing.assert_array_equal(got.weights.values, want.weights.values)
            np.testing.assert_array_equal(got.weights.totals, want.weights.totals)


def test_what_does_not_fit_is_refused(context):
    """Before a pointer to it reaches C++."""
    llama, _ = models(context, **SHAPES["all heads"])
    matrix, narrow, store, none = packed(context, random(50, 64)), packed(context, random(50, 32)), Store.zeros(
        3, 160, 2, 32), np.empty(0, np.int32)  # fmt: skip
    head = Head(None, None, None, 0.0, None, vocabulary=50, hidden_size=64)
    place, room = store.place, Room()
    for embedding, lm_head in ((Table.of(narrow), matrix), (Table.of(matrix), narrow)):
        with pytest.raises(ValueError, match="width 64"):
            llama.run(embedding, lm_head, [16, 0, 1], [3], place, none, room)
        with pytest.raises(ValueError, match="width 64"):
            llama.draft(embedding, lm_head, head, 3, 1, [16, 0, 1], [3], place, room)
    with pytest.raises(ValueError, match="width 64"):
        llama.append_context(packed(context, random(32, 64)), random(64), random(1, 64), [0], [16], place)
    for other in (Store.zeros(2, 160, 2, 32), Store.zeros(3, 160, 1, 32), Store.zeros(3, 160, 2, 64)):
        with pytest.raises(ValueError, match="another model"):
            llama.run(matrix, matrix, [16, 0, 1], [3], other.place, none, room)
    with pytest.raises(ValueError, match="without slots"):
        llama.draft(matrix, matrix, head, 3, 0, [16, 0, 0], [3], place, room)
    for wanted in ([1], [-1]):
        with pytest.raises(ValueError, match="rows that are not there"):
            llama.run(matrix, matrix, [16, 0, 1], [3], place, none, room, wanted)
    assert not store.keys.any()
    w1, w2 = random(50, 32).astype(np.float16), packed(context, random(40, 32))
    ids = np.arange(40, dtype=np.int32)
    Head(w1, w2, random(96), 0.0, ids, vocabulary=40, hidden_size=64)
    for bad, said in (
        ((w1, packed(context, random(40, 64)), None, 0.0, ids), "W2"),
        ((w1, w2, random(95), 0.0, ids), "confidence"),
        ((w1, w2, None, 0.0, ids[:39]), "draft ids"),
        ((w1[:39], w2, None, 0.0, ids), "W1"),
        ((w1.astype(np.float32), w2, None, 0.0, ids), "another type"),
    ):
        with pytest.raises(ValueError, match=said):
            Head(*bad, vocabulary=40, hidden_size=64)
    with pytest.raises(ValueError, match="anchors"):
        head.walk(context, np.zeros((2, 3, 50), np.float32), np.zeros((2, 3, 64), np.float32), np.zeros(1, np.int32))


@pytest.mark.parametrize(
    ("where", "token", "said"),
    [
        ((16, 0), 50, "channels outside 0 … 49"),
        ((16, 0), -1, "channels"),
        ((16, 127), 3, "positions outside 0 … 127"),
        ((16, -1), 3, "positions"),
        ((144, 15), 3, "slots outside 0 … 159"),
        ((-16, 20), 3, "see nothing"),
        ((8, 0), 3, "within a tile"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_written(context, where, token, said):
    llama, _ = models(context, **SHAPES["all heads"])
    matrix, store, room = packed(context, random(50, 64, seed=1)), Store.zeros(3, 160, 2, 32), Room()
    store.keys[:], store.values[:] = 7, 7
    head = Head(None, None, None, 0.0, None, vocabulary=50, hidden_size=64)
    with pytest.raises(ValueError, match=said):
        llama.run(Table.of(matrix), matrix, [*where, 2], [3, token], store.place, np.empty(0, np.int32), room)
    with pytest.raises(ValueError, match=said):
        llama.draft(Table.of(matrix), matrix, head, 3, 2, [*where, 2], [token], store.place, room)
    if "channels" not in said and "tile" not in said and "nothing" not in said:
        slots, fc = [sum(where), sum(where) + 1], packed(context, random(64, 64))
        with pytest.raises(ValueError, match=said):
            llama.append_context(fc, random(64), random(2, 64), [where[1], where[1] + 1], slots, store.place)
    assert (store.keys == 7).all()
    assert (store.values == 7).all()


def test_a_row_that_is_no_number_spoils_no_row_before_it(context):
    llama, _ = models(context, **SHAPES["SmolLM2"])
    rows, new_store = random(9, 576, seed=9), lambda: Store.zeros(1, 128, 3, 64)
    clean, _ = forward(llama, rows[:8], 0, 16, new_store())
    for bad in (np.nan, np.inf):
        rows[8] = bad
        out, _ = forward(llama, rows, 0, 16, new_store())
        assert (out[:8] == clean).all()
        assert not np.isfinite(out[8]).any()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_row_without_end_is_rounded_alike_wherever_it_stands(context, bad):
    matrix, x = packed(context, random(32, 64, seed=1)), random(7, 64, seed=2)
    x[[0, 5], 3] = bad
    x[5] = x[0]
    out = matrix.product(x)
    np.testing.assert_array_equal(out[0], out[5])
    np.testing.assert_array_equal(out[[1, 6]], matrix.product(x[[1, 6]]))


@pytest.mark.parametrize("seen", [27, 28])
def test_a_block_sees_its_context_and_all_of_itself(context, seen):
    """What a drafter does: context keys and values from features, then rows without a mask among them."""
    shape = SHAPES["SmolLM2"]
    llama, reference = models(context, **shape)
    hidden = shape["hidden"]
    fc, norm = packed(context, random(hidden, 2 * hidden, seed=3, scale=0.03)), 1 + random(hidden, seed=4, scale=0.1)
    store, plain = Store.zeros(1, 128, 3, 64), reference()
    features = random(21, 2 * hidden, seed=5)
    for start, stop in ((0, 16), (16, 21)):
        position = np.arange(start, stop, dtype=np.int32)
        llama.append_context(fc, norm, features[start:stop], position.tolist(), (position + 48).tolist(), store.place)
        normed = rms_norm(
            product(torch.from_numpy(features[start:stop]), dequantised(fc)), torch.from_numpy(norm), 1e-5
        )
        plain.append_context(normed, torch.arange(start, stop))
    block = random(7, hidden, seed=6)
    out, _ = forward(llama, block, 21, 48, store, visible=seen)
    want, _ = plain.forward(torch.from_numpy(block), torch.arange(21, 28), torch.full((7,), seen))
    assert np.abs(out - want.numpy()).mean() < 5e-3
    # what lies past it is never looked at, whatever it holds (slot 75 is the block's own to write)
    nan, end = np.uint16(0x7FFF), 48 + seen  # in float16 and in bfloat16
    store.keys[:, :, 5:], store.values[:, :, 76:] = nan, nan
    tile = store.keys[:, :, 76 // 16]  # [L, Hk, D, 16], or for the matrix unit [L, Hk, D/2, 16, 2]
    slots = tile.reshape(1, 3, 32, 16, 2) if context.kv_bfloat else tile
    assert np.shares_memory(slots, store.keys)
    slots[:, :, :, 76 % 16 :] = nan
    last = block.copy()
    if end == 75:
        last[6] = np.nan  # nobody sees the last row, itself neither
    again, _ = forward(llama, last, 21, 48, store, visible=seen)
    assert (again[:6] == out[:6]).all()


@pytest.mark.parametrize("shape", ["SmolLM2", "all heads", "Gemma 3", "four to a key"])
def test_rows_see_from_where_they_are_told(context, shape):
    """Each row from a position of its own on, within a tile of 16 too; what is before that may be anything finite."""
    options = SHAPES[shape]
    llama, reference = models(context, **options)
    store, plain = Store.zeros(options["layers"], 128, options["kv_heads"], options["size"]), reference()
    past, rows = random(60, options["hidden"], seed=1), random(9, options["hidden"], seed=2)
    forward(llama, past, 0, 32, store)
    plain.forward(torch.from_numpy(past), torch.arange(60), torch.arange(1, 61))
    begin = np.array([60, 55, 40, 17, 16, 63, 15, 1, 0], dtype=np.int32)
    visible = torch.arange(61, 70)
    out, _ = forward(llama, rows, 60, 32, store, begin=begin)
    want, _ = plain.forward(torch.from_numpy(rows), visible - 1, visible, torch.from_numpy(begin))
    assert np.abs(out - want.numpy()).mean() < 1e-2
    assert np.abs(out - forward(llama, rows, 60, 32, store)[0])[:8].mean(-1).min() > 1e-3  # or it does not matter
    store.keys[:, :, 2], store.values[:, :, 32:48] = 0x7000, 0x7000  # positions 0 … 15
    again, _ = forward(llama, rows, 60, 32, store, begin=begin)
    assert (again[:6] == out[:6]).all()
    assert (again[6:] != out[6:]).any(-1).all()


@pytest.mark.parametrize("shape", ["SmolLM2", "all heads", "Gemma 3", "20 query heads"])
def test_a_ring_is_a_store_of_which_only_the_latest_positions_are_looked_at(context, shape):
    """To the bit, over several times round: what a drafter with a window does, context and blocks."""
    options = SHAPES[shape]
    llama, _ = models(context, **options)
    hidden, window, gamma = options["hidden"], 40, 7
    sizes = options["layers"], options["kv_heads"], options["size"]
    whole, ring = Store.zeros(sizes[0], 160, *sizes[1:]), Store.zeros(sizes[0], 96, *sizes[1:], ring=64)
    fc, norm = packed(context, random(hidden, hidden, seed=3)), 1 + random(hidden, seed=4, scale=0.1)
    embedding, lm_head = (
        Table.of(packed(context, random(50, hidden, seed=1))),
        packed(context, random(50, hidden, seed=2)),
    )
    head = Head(None, None, random(hidden, seed=5), 0.0, None, vocabulary=50, hidden_size=hidden)
    at = 0
    for rows in (30, 17, 26) if SANITIZE else (3, 30, 1, 17, 2, 26, 40):
        taps, positions = random(rows, hidden, seed=at), list(range(at, at + rows))
        llama.append_context(fc, norm, taps, positions, [16 + p for p in positions], whole.place)
        llama.append_context(fc, norm, taps, positions, [32 + p % 64 for p in positions], ring.place)
        at += rows
        x = random(gamma, hidden, seed=100 + at)
        begin = np.full(gamma, max(0, at - window), dtype=np.int32)
        one, _ = forward(llama, x, at, 16, whole, visible=at + gamma, begin=begin)
        other, _ = forward(llama, x, at, 32, ring, visible=at + gamma, begin=begin)
        assert (one == other).all()
        drafted = [
            llama.draft(
                embedding, lm_head, head, 7, gamma, [slot, at, gamma], [at % 50], store.place, Room(), window=window
            )
            for slot, store in ((16, whole), (32, ring))
        ]
        for mine, theirs in zip(drafted[0][:3], drafted[1][:3], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(ValueError, match="more than a ring of 64"):
        llama.draft(embedding, lm_head, head, 7, gamma, [32, at, gamma], [1], ring.place, Room())
    with pytest.raises(ValueError, match="slots outside"):
        llama.draft(embedding, lm_head, head, 7, gamma, [48, at, gamma], [1], ring.place, Room(), window=window)
    with pytest.raises(ValueError, match="ring"):
        Store.zeros(1, 128, 1, 32, ring=48)


# --- the sequential head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 2, 5, 17, 40])
@pytest.mark.parametrize("reduced", [True, False], ids=["draft vocabulary", "all"])
@pytest.mark.parametrize("sampled", [0, 0.5, 1], ids=["greedy", "mixed", "sampled"])
def test_the_walk(context, streams, reduced, sampled):
    gamma, vocabulary, target_vocabulary, rank, hidden = 5, 83, 83 if not reduced else 200, 32, 48
    generator = np.random.default_rng(1)
    ids = np.sort(generator.permutation(target_vocabulary)[:vocabulary]).astype(np.int32)
    w1 = random(target_vocabulary, rank, seed=2).astype(np.float16)
    w2 = packed(context, random(vocabulary, rank, seed=3))
    confidence = random(hidden + rank, seed=4)
    base, h = random(streams, gamma, vocabulary, seed=5), random(streams, gamma, hidden, seed=6)
    anchors = generator.integers(0, target_vocabulary, streams).astype(np.int32)
    sampling = some_sampling(generator, streams, sampled, cuts=False)
    uniforms = generator.random((streams, gamma))
    head = Head(w1, w2, confidence, 0.25, ids if reduced else None, vocabulary=vocabulary, hidden_size=hidden)
    draft_ids = torch.from_numpy(ids).long() if reduced else None
    table, rows = torch.from_numpy(w1).float(), dequantised(w2)
    markov = SimpleNamespace(
        initial_state=lambda _: None,
        embed=lambda tokens: table[tokens],
        step=lambda e, *_: (e, None),
        bias=lambda e: product(e, rows),
    )
    logits = torch.from_numpy(base.copy())
    heads = SimpleNamespace(markov_head=markov, confidence_head=None, draft_ids=draft_ids, base_logits=lambda _: logits)
    draws = [Draw(by, u if by.temperature else ()) for by, u in zip(sampling, uniforms.tolist(), strict=True)]
    drafted = walk(heads, torch.from_numpy(h), anchors.tolist(), draws)
    want = torch.tensor(drafted.tokens)
    got = head.walk(context, base, h, anchors, rows_of(sampling), uniforms)
    np.testing.assert_array_equal(got.tokens, want)
    np.testing.assert_array_equal(ids[got.indices] if reduced else got.indices, want)
    previous = torch.cat((torch.from_numpy(anchors).long().unsqueeze(1), want[:, :-1]), 1)
    e = torch.cat((torch.from_numpy(h), table[previous]), -1)
    np.testing.assert_allclose(got.logits, e @ torch.from_numpy(confidence) + 0.25, rtol=1e-4, atol=1e-4)
    assert (got.weights is None) == (not any(by.temperature for by in sampling))
    for r, by in enumerate(sampling):
        for k in range(gamma if by.temperature else 0):
            row, q = got.weights.probabilities(r * gamma + k), drafted.q(r).probabilities(k)
            np.testing.assert_allclose(row, q, rtol=0.05, atol=1e-4)  # an activation may round the other way


@pytest.mark.parametrize("sampled", [0, 1], ids=["greedy", "sampled"])
def test_w1_with_rows_of_the_draft_vocabulary_alone(context, sampled):
    """The others' are zeros: after an anchor that is never drafted there is no bias."""
    streams, gamma, rank, rng = 7, 4, 32, np.random.default_rng(2)
    ids = np.sort(rng.permutation(200)[:83]).astype(np.int32)
    rows, w2 = random(83, rank, seed=2).astype(np.float16), packed(context, random(83, rank, seed=3))
    whole = np.zeros((200, rank), dtype=np.float16)
    whole[ids] = rows
    base, h = random(streams, gamma, 83, seed=5), random(streams, gamma, 48, seed=6)
    outside = np.setdiff1d(np.arange(200), ids)
    anchors = np.array([ids[0], ids[-1], ids[40], outside[0], outside[-1], outside[50], outside[9]], dtype=np.int32)
    drawn = rows_of([Sampling(float(sampled))] * streams), rng.random((streams, gamma))
    got = [
        Head(w1, w2, random(48 + rank, seed=4), 0.25, ids, vocabulary=83, hidden_size=48).walk(
            context, base.copy(), h, anchors, *drawn
        )
        for w1 in (rows, whole)
    ]
    for mine, theirs in zip(got[0][:3], got[1][:3], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    if not sampled:
        assert (got[0].indices[3:, 0] == base[3:, 0].argmax(-1)).all()
        assert (got[0].indices[:3, 0] != base[:3, 0].argmax(-1)).any()


def test_drafts_are_drawn_with_cuts(context):
    """Drafts of streams with top-k, top-p and min-p, some greedy among them: from what torch would draw from."""
    streams, gamma, vocabulary, rank, rng = 23, 3, 1003, 32, np.random.default_rng(4)
    ids = np.sort(rng.permutation(2000)[:vocabulary]).astype(np.int32)
    w1, w2 = random(2000, rank, seed=2).astype(np.float16), packed(context, random(vocabulary, rank, seed=3))
    head = Head(w1, w2, None, 0.0, ids, vocabulary=vocabulary, hidden_size=16)
    base, anchors = 2 * random(streams, gamma, vocabulary, seed=5), rng.integers(0, 2000, streams).astype(np.int32)
    base[::2] = base[::2].round()  # many of one score
    sampling, uniforms = some_sampling(rng, streams, 0.8), rng.random((streams, gamma))
    hidden = np.zeros((streams, gamma, 16), dtype=np.float32)
    got = head.walk(context, base.copy(), hidden, anchors, rows_of(sampling), uniforms)
    previous, cut = anchors, 0
    for k in range(gamma):
        scores = base[:, k] + w2.product(w1[previous].astype(np.float32))
        for r, by in enumerate(sampling):
            if not by.temperature:
                assert got.indices[r, k] == scores[r].argmax()
                continue
            p = got.weights.probabilities(r * gamma + k)
            same_but_for_the_border(p, torch_distribution(scores[r], by))
            assert got.indices[r, k] == draw(torch.from_numpy(p), uniforms[r, k])
            assert p[got.indices[r, k]] > 0
            cut += (p == 0).any()
        previous = ids[got.indices[:, k]]
        np.testing.assert_array_equal(previous, got.tokens[:, k])
    assert cut > 20


def test_the_walk_without_heads_is_an_argmax_and_ties_go_to_the_first(context):
    base = np.zeros((3, 4, 70), dtype=np.float32)
    base[1, 2, 50] = base[1, 2, 60] = 1.0
    base[2, 3] = -np.inf
    base[2, 3, 69] = -1e30
    head = Head(None, None, None, 0.0, None, vocabulary=70, hidden_size=16)
    hidden, anchors = np.zeros((3, 4, 16), dtype=np.float32), np.zeros(3, dtype=np.int32)
    got = head.walk(context, base, hidden, anchors)
    assert got.tokens.tolist() == [[0, 0, 0, 0], [0, 0, 50, 0], [0, 0, 0, 69]]
    assert not got.logits.any()
    assert got.weights is None
    with pytest.raises(ValueError, match="uniforms"):
        head.walk(context, base, hidden, anchors, at(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="sampling"):
        head.walk(context, base, hidden, anchors, at(1.0), np.zeros((3, 4)))


# --- sampling ------------------------------------------------------------------------------------------------


UNIFORMS = [0.0, 1e-9, 0.1, 0.25, 0.5, 0.9, 0.999999, 1 - 2**-53]


@pytest.mark.parametrize("width", [1, 15, 16, 83, 4099])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_weights_are_the_distribution_and_draws_go_by_it(context, width, rows):
    scores, temperatures = 4 * random(rows, width), np.linspace(0.4, 2, rows)
    want = torch.softmax(torch.from_numpy(scores).double() / torch.from_numpy(temperatures).unsqueeze(1), -1)
    weights = Weights.of(context, scores, at(*temperatures))
    for r in range(rows):
        p = torch.from_numpy(weights.probabilities(r))
        np.testing.assert_allclose(p, want[r], rtol=1e-5, atol=1e-9)
        assert weights.probability(r, width // 2) == pytest.approx(float(p[width // 2]), rel=1e-6)
        for uniform in UNIFORMS[:-2]:
            assert weights.draw(r, uniform) == draw(p, uniform)
        assert all(0 <= weights.draw(r, u) < width for u in UNIFORMS)


def torch_distribution(scores, by):
    """What the contract draws from."""
    return distributions(torch.from_numpy(scores.copy()).unsqueeze(0), [by])[0]


def same_but_for_the_border(p, want, mass=3e-5):
    """Probabilities [V] are those of the other but where a token is just in or just out: sums are rounded."""
    p, want = np.asarray(p, dtype=np.float64), np.asarray(want, dtype=np.float64)
    unlike = (p > 0) != (want > 0)
    if unlike.any():
        one = np.maximum(p, want)[unlike]
        assert one.sum() < mass
        assert one.max() <= 1.001 * min(p[p > 0].min(), want[want > 0].min()) + one.sum()
    np.testing.assert_allclose(p[~unlike], want[~unlike], rtol=2e-4, atol=1e-9)


CUTS = [
    *(Sampling(1.0, top_k=k) for k in (1, 20, 1000)),
    *(Sampling(0.8, top_p=p) for p in (0.1, 0.5, 0.9, 0.99, 0.999)),
    *(Sampling(1.3, min_p=p) for p in (1e-4, 0.05, 0.5, 1.0)),
    Sampling(0.6, top_p=0.95, top_k=20),
    Sampling(1.5, top_p=0.9, min_p=0.02, top_k=1000),
    Sampling(1.0, top_p=0.999, top_k=1),
    Sampling(2.0),
]


@pytest.mark.parametrize("width", [100, 5000, *([] if SANITIZE else [150_000])])
@pytest.mark.parametrize("shape", ["random", "peaked", "flat", "ties", "all alike"])
def test_cuts_are_those_of_torch(context, width, shape):
    """Every cut is a threshold: the same tokens stay, those of one score together, and in the same proportions."""
    scores = {
        "random": lambda: 3 * random(1, width),
        "peaked": lambda: 15 * random(1, width) ** 3,
        "flat": lambda: 0.01 * random(1, width),
        "ties": lambda: (2 * random(1, width)).round() / 2,
        "all alike": lambda: np.full((1, width), -3.5, dtype=np.float32),
    }[shape]()
    rows = np.repeat(scores, len(CUTS), 0)
    weights = Weights.of(context, rows.copy(), rows_of(CUTS))
    for r, by in enumerate(CUTS):
        p = weights.probabilities(r)
        same_but_for_the_border(p, torch_distribution(scores[0], by))
        kept = p > 0
        if by.top_k:
            least = np.sort(scores[0])[-min(by.top_k, width)]
            assert (scores[0][kept] >= least).all()
        for score in np.unique(scores[0][kept])[:50] if shape in ("ties", "all alike") else ():
            assert kept[scores[0] == score].all()  # of one score all or none
        assert weights.totals[r] == pytest.approx(weights.values[r].sum(dtype=np.float64), rel=1e-6)
        assert all(kept[weights.draw(r, u)] for u in UNIFORMS)
    alone = Weights.of(context, rows[3:4].copy(), rows_of(CUTS[3:4]))
    np.testing.assert_array_equal(alone.values[0], weights.values[3])  # whoever else is in the batch


@pytest.mark.parametrize("by", CUTS, ids=str)
def test_cuts_of_what_is_no_number(context, by):
    """Tokens ruled out, and rows with NaN: what is drawn was not ruled out, and of broken rows nothing is drawn."""
    scores = random(5, 300)
    scores[0, :280] = -np.inf
    scores[1, 7], scores[2], scores[3], scores[4, 299] = np.nan, np.nan, -np.inf, np.nan
    weights = Weights.of(context, scores, rows_of([by] * 5))
    assert all(weights.draw(0, u) >= 280 for u in UNIFORMS)
    for row in (1, 2, 3, 4):
        assert {weights.draw(row, u) for u in UNIFORMS} == {-1}
        assert np.isnan(weights.probability(row, 8))
        assert weights.draw_rest(row, 0.5, 1.0, np.full(300, 1 / 300, dtype=np.float32), None) == -1


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("reduced", [True, False], ids=["draft vocabulary", "all"])
def test_what_is_left_after_a_rejection(context, reduced, share):
    width = 1003
    ids = np.sort(np.random.default_rng(3).permutation(width)[:371]).astype(np.int32) if reduced else None
    weights = Weights.of(context, 3 * random(1, width), at(0.8))
    q = torch.softmax(3 * torch.from_numpy(random(371 if reduced else width, seed=1)), 0)
    p = torch.from_numpy(weights.probabilities(0))
    left = residual(p, share, q, None if ids is None else torch.from_numpy(ids).long())
    assert weights.overlap(0, share, q.numpy(), ids) == pytest.approx(share - float(left.sum()), abs=1e-6)
    uniforms = np.linspace(0, 1, 201 if SANITIZE else 4001)[:-1]
    drawn = [weights.draw_rest(0, u, share, q.numpy(), ids) for u in uniforms]
    assert all(left[token] > 0 for token in drawn)
    apart = sum(a != draw(left, u) for a, u in zip(drawn, uniforms, strict=True))
    assert apart <= 4  # at borders, by rounding
    # nothing left but rounding: any draw from p is right
    alone = Weights.of(context, np.array([[0.0, -np.inf, 0.0]], dtype=np.float32), at(1.0))
    assert {alone.draw_rest(0, u, 1.0, alone.probabilities(0), None) for u in UNIFORMS} == {0, 2}


@pytest.mark.parametrize("reduced", [True, False], ids=["draft vocabulary", "all"])
def test_blocks_are_judged_as_by_the_reference(context, reduced):
    """Guards against another outcome by one call than by the engine's own steps, at any length and in any row."""
    width, gamma, rng = 203, 5, np.random.default_rng(5)
    ids = np.sort(rng.permutation(width)[:71]).astype(np.int32) if reduced else np.arange(width, dtype=np.int32)
    outcomes = set()
    for trial in range(40 if SANITIZE else 400):
        length, before = 1 + trial % gamma, trial % 3  # rows of others lie before
        scores = 2 * random(gamma + 1, width, seed=trial)
        scores[:, ids] += 2.0
        near = scores[:gamma][:, ids] + 0.7 * random(gamma, len(ids), seed=10_000 + trial)
        q = Weights.of(context, np.concatenate([random(before, len(ids)), near]), at(*[1.0] * (before + gamma)))
        p = Weights.of(context, np.concatenate([random(before, width), scores]), at(*[1.0] * (before + gamma + 1)))
        uniforms = RoundUniforms(trial, 0, gamma)
        indices = [q.draw(before + k, u) for k, u in enumerate(uniforms.draft)]
        block = Block(tokens=ids[indices].tolist(), indices=indices, uniforms=uniforms)
        draft_ids = torch.from_numpy(ids).long()
        block.q = NativeDistributions(q, before)
        got = rejection(NativeDistributions(p, before), 0, None, block, length, draft_ids if reduced else None)
        block.q = Dense(torch.stack([torch.from_numpy(q.probabilities(before + k)) for k in range(gamma)]))
        assert got == rejection(NativeDistributions(p, before), 0, None, block, length, draft_ids)
        outcomes.add((length, got.accepted))
    assert SANITIZE or len(outcomes) == 20  # every prefix of every length, and none
    fine = {"first": 0, "tokens": [0], "q": q, "q_first": 0, "indices": [0], "ids": ids, "accept": [0.5]}
    for wrong in ({"tokens": [width]}, {"indices": [len(ids)]}, {"indices": []}, {"accept": []}, {"first": 99}):
        with pytest.raises(ValueError, match="drafts"):
            p.judge(**fine | wrong, uniform=0.5)


def test_a_row_of_nan_refuses_its_draft(context):
    """Guards against a NaN that counts as certainty: nothing stands from that row on, and what stands before it does so
    as often as ever.
    """
    scores = np.zeros((4, 40), dtype=np.float32)
    q = Weights.of(context, scores[:3].copy(), at(1.0, 1.0, 1.0))
    for bad in range(3):
        broken = scores.copy()
        broken[bad] = np.nan
        p = Weights.of(context, broken, at(*[1.0] * 4))
        block = Block(tokens=[1, 2, 3], indices=[1, 2, 3], uniforms=RoundUniforms(1, 0, 3))
        for own in (NativeDistributions(q), Dense(torch.full((3, 40), 1 / 40))):
            block.q = own
            for seed in range(20):
                block.uniforms = RoundUniforms(seed, 0, 3)
                # p and q are alike, so that whatever is judged stands
                assert rejection(NativeDistributions(p), 0, None, block, 3, None) == (bad, -1)
            block.q = None  # looked up: the first draft stands once in 40 times
            accepted, bonus = rejection(NativeDistributions(p), 0, None, block, 3, None)
            assert (accepted, bonus) == (0, -1) if bad == 0 else accepted < bad
            assert (bonus < 0) == (accepted == bad)


def test_tokens_of_no_weight_are_never_drawn(context):
    scores = np.full((3, 40), -np.inf, dtype=np.float32)
    scores[0, 17] = 0.0
    scores[1, [3, 39]] = 5.0, 5.0 - 200.0  # further away than any weight reaches
    scores[2] = np.nan
    weights = Weights.of(context, scores, at(1.0, 1.0, 1.0))
    assert {weights.draw(0, u) for u in UNIFORMS} == {17}
    assert {weights.draw(1, u) for u in UNIFORMS} == {3}
    assert {weights.draw(2, u) for u in UNIFORMS} == {-1}
    with pytest.raises(ValueError, match="temperature"):
        Weights.of(context, np.zeros((2, 4), dtype=np.float32), at(1.0, 0.0))
    with pytest.raises(ValueError, match="vocabulary"):
        weights.draw_rest(0, 0.5, 1.0, np.zeros(4, dtype=np.float32), np.array([0, 1, 2, 40], dtype=np.int32))
    with pytest.raises(ValueError, match="vocabulary"):
        weights.draw_rest(0, 0.5, 1.0, np.zeros(4, dtype=np.float32), None)
    with pytest.raises(ValueError, match="vocabulary"):
        weights.overlap(0, 1.0, np.zeros(4, dtype=np.float32), None)


# --- races ---------------------------------------------------------------------------------------------------


RACES = [*CUTS, Sampling(0.7, top_p=0.8, top_k=20), Sampling(0.05)]


@pytest.mark.parametrize("width", [1, 15, 63, 100, 5000, *([] if SANITIZE else [30_003])])
@pytest.mark.parametrize("shape", ["random", "peaked", "flat", "ties"])
def test_races_are_won_as_the_reference_says(context, width, shape):
    """Guards against noise of a kernel's own, and against a token that is passed over though it would have won."""
    scores = {
        "random": lambda: 3 * random(1, width),
        "peaked": lambda: 15 * random(1, width) ** 3,
        "flat": lambda: 0.01 * random(1, width),
        "ties": lambda: (2 * random(1, width)).round() / 2,
    }[shape]()
    noise = [((1 << 64) - 1 - 7919 * i, 2**24 - 1 - i) for i in range(len(RACES))]
    rows = np.repeat(scores, len(RACES), 0)
    p = Weights.of(context, rows.copy(), rows_of(RACES))
    got = race(context, rows.copy(), rows_of(RACES), noise_rows(noise))
    for i, (by, (seed, position)) in enumerate(zip(RACES, noise, strict=True)):
        e = token_exponentials(seed, position, width)
        assert got[i] == int((e / torch.from_numpy(p.values[i]).double()).argmin())
        by_torch = torch_distribution(scores[0], by)
        if got[i] != int((e / by_torch.double()).argmin()):  # two were as good as equal, or one was just in or just out
            border = (p.values[i] > 0) != (by_torch.numpy() > 0)
            ratio = (e / by_torch.double()).sort().values
            assert border.any() or ratio[1] < ratio[0] * (1 + 1e-5)
    some = [5, 0, 3]
    alone = rows.copy()
    assert race(context, alone, rows_of([RACES[i] for i in some]), noise_rows([noise[i] for i in some]), some) == [
        got[i] for i in some
    ]
    np.testing.assert_array_equal(alone[1], rows[1])  # who does not race keeps its scores
    np.testing.assert_array_equal(alone[5], p.values[5])


@pytest.mark.skipif(SANITIZE, reason="a law, and of calls that others make")
def test_a_race_draws_by_the_weights(context):
    """Guards against a wrong law, whatever the reference thinks: over many positions tokens come up as often as they
    should, far down the row too."""
    scores = np.repeat((2 * random(1, 200, seed=3)).astype(np.float32), 500, 0)
    p = Weights.of(context, scores[:1].copy(), at(1.3)).probabilities(0).astype(np.float64)
    count, positions = np.zeros(200), 40 * 500
    for first in range(0, positions, 500):
        tokens = race(context, scores.copy(), at(*[1.3] * 500), noise_rows([(9, first + i) for i in range(500)]))
        count += np.bincount(tokens, minlength=200)
    many = p * positions > 5
    chi = ((count - positions * p) ** 2 / (positions * p))[many].sum()
    assert abs(chi - many.sum()) < 4 * (2 * many.sum()) ** 0.5
    assert many.sum() > 100


def test_races_do_not_depend_on_threads_or_company(context):
    """Guards against a text that changes with the machine's load: to the token, for any share of a row."""
    rows, width = 9, 4099
    scores = 3 * random(rows, width)
    by, noise = rows_of((RACES * 2)[:rows]), noise_rows([(77, i) for i in range(rows)])
    want = race(context, scores.copy(), by, noise)
    for threads in (1, 3, 7):
        own = Context(threads, context.isa, sanitize=SANITIZE)
        assert race(own, scores.copy(), by, noise) == want
        for i in range(rows):
            assert race(own, scores[i : i + 1].copy(), by[i : i + 1].copy(), noise[i : i + 1].copy()) == want[i : i + 1]


def test_races_of_what_is_no_number(context):
    scores = random(4, 300)
    scores[0, :280] = -np.inf
    scores[1, 7], scores[2], scores[3] = np.nan, np.nan, -np.inf
    for position in range(50):
        noise = noise_rows([(3, position)] * 4)
        got = race(context, scores.copy(), at(*[1.0] * 4), noise)
        assert got[0] >= 280
        assert got[1:] == [-1, -1, -1]
    fine = {"sampling": at(*[1.0] * 4), "noise": noise, "rows": [0, 1, 2, 3]}
    for wrong, said in (
        ({"sampling": at(1.0, 1.0, 0.0, 1.0)}, "temperature above 0"),
        ({"noise": noise_rows([(3, -1)] * 4)}, "without a position"),
        ({"noise": noise[:3].copy()}, "noise of other rows"),
        ({"rows": [0, 1, 2, 4]}, "not there"),
        ({"rows": [0, 1, 1, 2]}, "a row twice"),
    ):
        with pytest.raises(ValueError, match=said):
            race(context, scores.copy(), **fine | wrong)
    assert race(context, scores[:0], at(), noise_rows([])) == []


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("reduced", [True, False], ids=["draft vocabulary", "all"])
def test_drafts_race_under_the_targets_noise(context, reduced, threads):
    """Greedy, drawn and racing streams together; a racing one's draft wins under the noise of the target's token."""
    context = Context(threads, context.isa, sanitize=SANITIZE)
    streams, gamma, vocabulary, rank, rng = 11, 4, 403, 32, np.random.default_rng(4)
    tokens = 1000 if reduced else vocabulary
    ids = np.sort(rng.permutation(tokens)[:vocabulary]).astype(np.int32)
    w1, w2 = random(tokens, rank, seed=2).astype(np.float16), packed(context, random(vocabulary, rank, seed=3))
    head = Head(w1, w2, None, 0.0, ids if reduced else None, vocabulary=vocabulary, hidden_size=16)
    base, anchors = 2 * random(streams, gamma, vocabulary, seed=5), rng.integers(0, tokens, streams).astype(np.int32)
    sampling, uniforms = some_sampling(rng, streams, 0.8), rng.random((streams, gamma))
    noise = [(1000 + r, 50 + r) if r % 3 else None for r in range(streams)]
    hidden, rows = np.zeros((streams, gamma, 16), dtype=np.float32), noise_rows([own or (0, -1) for own in noise])
    got = head.walk(context, base.copy(), hidden, anchors, rows_of(sampling), uniforms, rows)
    plain = head.walk(context, base.copy(), hidden, anchors, rows_of(sampling), uniforms)
    order = torch.from_numpy(ids).long() if reduced else None
    raced = 0
    for r, (by, own) in enumerate(zip(sampling, noise, strict=True)):
        if not (by.temperature and own):
            assert got.tokens[r].tolist() == plain.tokens[r].tolist()
            continue
        for k in range(gamma):
            q = torch.from_numpy(got.weights.values[r * gamma + k])
            e = token_exponentials(own[0], own[1] + k, tokens)
            assert got.indices[r, k] == int(((e if order is None else e[order]) / q.double()).argmin())
            raced += 1
    assert raced >= 20
    assert (got.tokens == ids[got.indices] if reduced else got.tokens == got.indices).all()
    with pytest.raises(ValueError, match="noise"):
        head.walk(context, base.copy(), hidden, anchors, rows_of(sampling), uniforms, rows[1:].copy())


@pytest.mark.skipif(SANITIZE, reason="minutes, and of calls that others make")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_pass_is_the_same_in_any_company_and_on_any_number_of_threads(context, shape):
    """Guards against logits that know their batch, to the bit: then no seed would give the same text at any load. A
    text written one row a pass, beside passes of blocks among others' rows, is prefilled in pieces on other threads.
    """
    generator = np.random.default_rng(5)
    states = {}
    for threads, pieces in ((1, [1] * 24), (2, [24]), (2, [5, 1, 8, 2, 8]), (3, [16, 8]), (5, [3] * 8)):
        own = Context(threads, context.isa, sanitize=SANITIZE)
        llama, _ = models(own, **shape)
        store = Store.zeros(llama.num_layers, 64 * 9, llama.kv_heads, llama.head_size)
        tokens = random(24, llama.hidden, seed=8)
        out, at_row = [], 0
        for size in pieces:
            others = int(generator.integers(0, 8))  # streams beside it, before it and after it, of a few rows each
            rows = [
                (64 * (1 + i), int(generator.integers(0, 20)), int(generator.integers(1, 9))) for i in range(others)
            ]
            place = int(generator.integers(0, others + 1))
            rows.insert(place, (0, at_row, size))
            x = [random(n, llama.hidden, seed=int(generator.integers(1 << 30))) for _, _, n in rows]
            x[place] = tokens[at_row : at_row + size]
            position = np.concatenate([p + np.arange(n) for _, p, n in rows]).astype(np.int32)
            first = np.concatenate([np.full(n, slot) for slot, _, n in rows]).astype(np.int32)
            x = np.ascontiguousarray(np.concatenate(x), dtype=np.float32)
            llama.forward(x, Pass(position, first + position, first, position + 1), store,
                          np.empty(0, np.int32), np.empty((len(x), 0), np.float32))  # fmt: skip
            before = sum(n for _, _, n in rows[:place])
            out.append(x[before : before + size])
            at_row += size
        states[threads, tuple(pieces)] = np.concatenate(out)
    want = next(iter(states.values()))
    assert np.isfinite(want).all()
    for how, got in states.items():
        np.testing.assert_array_equal(got, want, err_msg=str(how))


# --- builds --------------------------------------------------------------------------------------------------


def test_one_thread_and_many_agree_to_the_bit(context):
    weights, x = random(100, 96), random(9, 96, seed=1)
    results = []
    for threads in (1, 2, 5):
        own = Context(threads, context.isa, sanitize=SANITIZE)
        results.append(packed(own, weights, Kind.FOUR_M).product(x))
    assert all((r == results[0]).all() for r in results)


def test_without_a_compiler_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(building, "compiler", lambda: None)
    with pytest.raises(building.NoCompilerError, match=r"apt-get install g\+\+"):
        building.build("portable")


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(building, "compiler", lambda: ["/bin/false"])
    with pytest.raises(building.NoCompilerError, match=r"/bin/false .* failed"):
        building.build("portable")
    assert not list((tmp_path / "dspark-stream" / "kernels").iterdir())


@pytest.mark.skipif(SANITIZE, reason="a program of its own")
def test_the_pool_does_each_unit_once_and_shows_it_to_all(tmp_path):
    """Guards against races of threads that were away when a step or a job ended: a program under a thread sanitizer."""
    program, sources = tmp_path / "stress", building.SOURCE
    built = subprocess.run(
        [*building.compiler(), "-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-pthread", f"-I{sources}",
         "-o", str(program), str(Path(__file__).with_name("pool_stress.cpp"))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no sanitizer runtime")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the sanitizer cannot run under this kernel's address layout")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "each unit once\n"


@pytest.mark.timeout(1800)
@pytest.mark.skipif(SANITIZE, reason="this is what it runs")
def test_the_sanitizers_find_nothing():
    """The same tests on an instrumented build, in a process that has its runtime loaded before anything else."""
    found = building.compiler()
    runtimes = [
        subprocess.run([*found, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(r) for r in runtimes):
        pytest.skip("the compiler has no sanitizer runtime")
    for isa in supported_isas():  # minutes on a small machine, which no single test is given
        building.build(isa, sanitize=True)
    environment = os.environ | {
        "DSPARK_CPU_SANITIZE": "1",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, and many
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
