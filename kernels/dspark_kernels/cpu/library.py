"""The C++ kernels as Python objects. What they compute is said in `reference.py`; shapes are checked here.

Arrays are numpy, C-contiguous. Symbols: T rows of all streams, H hidden size, D head size, Hq and Hk query and key
heads, N token slots.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_kernels.cpu.build import Isa, NoCompilerError, build
from dspark_kernels.edits import EDIT, Edits

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Words = npt.NDArray[np.uint16]
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

GROUP = 32
"""Weights that share a scale; inputs of every matrix are a multiple of it."""
LANES = 16
"""Token slots of a key tile."""
RING_GRAIN = 64
"""Rings are multiples of this many token slots."""
LARGEST_RANK = 4096
"""Of a sequential head."""


class Kind(IntEnum):
    """How a matrix keeps its weights (csrc/matrix.h): bits of a quant, _M with a minimum of its own for each group of
    32, _K as GGUF's blocks of 256 with scales of scales, which nothing but these can be made of.
    """

    FOUR = 0
    FOUR_M = 1
    FOUR_K = 2
    FIVE = 3
    FIVE_M = 4
    SIX_K = 5
    EIGHT = 6

    @property
    def block(self) -> int:
        """Inputs are a multiple of it."""
        return 256 if self in (Kind.FOUR_K, Kind.SIX_K) else GROUP


class Source(IntEnum):
    """What matrices can be made from, by their number in GGUF files."""

    F32 = 0
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14

    @property
    def kind(self) -> Kind | None:
        """What holds its quants as they are; None: of floats, any."""
        return _BLOCKS[self][2]

    @property
    def block(self) -> int:
        """Weights of a block; rows are whole blocks."""
        return _BLOCKS[self][0]

    def nbytes(self, weights: int) -> int:
        """Bytes of that many weights."""
        return _BLOCKS[self][1] * weights // self.block


_BLOCKS: dict[Source, tuple[int, int, Kind | None]] = {
    Source.F32: (GROUP, 128, None),
    Source.Q4_0: (GROUP, 18, Kind.FOUR),
    Source.Q4_1: (GROUP, 20, Kind.FOUR_M),
    Source.Q5_0: (GROUP, 22, Kind.FIVE),
    Source.Q5_1: (GROUP, 24, Kind.FIVE_M),
    Source.Q8_0: (GROUP, 34, Kind.EIGHT),
    Source.Q4_K: (256, 144, Kind.FOUR_K),
    Source.Q5_K: (256, 176, Kind.FIVE_M),
    Source.Q6_K: (256, 210, Kind.SIX_K),
}
"""Weights of a block, its bytes, and what holds them."""


@cache
def load(isa: Isa, sanitize: bool = False) -> Any:
    """The library, with its functions' types.

    Raises:
        NoCompilerError: it cannot be built here.
    """
    path = build(isa, sanitize=sanitize)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompilerError(f"{path} cannot be loaded: {error}; remove it to have it built anew") from error
    pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    double, done = ctypes.c_double, ctypes.c_bool
    two, two_at, three, place = [integer] * 2, [pointer] * 2, [pointer] * 3, [long, integer]
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "isa": (ctypes.c_char_p, []),
        "error": (ctypes.c_char_p, []),
        "refused": (done, []),
        "context": (pointer, [integer]),
        "free_context": (None, [pointer]),
        "matrix": (pointer, [integer] * 3),
        "free_matrix": (None, [pointer]),
        "matrix_bytes": (long, [pointer]),
        "pack": (done, [*two_at, *two_at, integer]),
        "take": (None, [pointer, pointer, integer, pointer]),
        "rows": (None, [pointer, pointer, integer, pointer]),
        "table": (pointer, [pointer]),
        "file_table": (pointer, [integer, integer, integer, integer, long]),
        "free_table": (None, [pointer]),
        "table_rows": (done, [pointer, pointer, integer, pointer]),
        "product": (done, [*three, integer, pointer, integer, pointer]),
        "llama": (pointer, [*[integer] * 6, real, real, done, *three, integer]),
        "free_llama": (None, [pointer]),
        "add_layer": (done, [*three, *two]),
        "forward": (done, [pointer, pointer, integer, *[pointer] * 8, *place, pointer, integer, pointer]),
        "walk": (done, [*[pointer] * 4, *two, *[pointer] * 9]),
        "draft": (
            done,
            [*three, real, *[pointer] * 2, *[integer] * 3, pointer, integer, *three, *place, *[pointer] * 9],
        ),
        "run": (
            done,
            [*three, real, pointer, integer, *[pointer] * 4, *place, pointer, integer, *two_at, integer, *two_at],
        ),
        "best": (done, [pointer, pointer, integer, pointer, integer, pointer]),
        "edit": (done, [pointer, pointer, *two, *[pointer] * 4]),
        "weigh": (done, [pointer, pointer, *two, pointer, pointer]),
        "race": (done, [pointer, pointer, integer, pointer, integer, *three]),
        "draw": (integer, [pointer, integer, double, double]),
        "draw_rest": (integer, [pointer, integer, double, double, pointer, pointer, integer, double]),
        "overlap": (double, [pointer, integer, double, double, pointer, pointer, integer]),
        "judge": (
            integer,
            [pointer, pointer, integer, pointer, pointer, integer, *[pointer] * 3, integer, pointer, double, pointer],
        ),
        "append_context": (done, [*[pointer] * 4, integer, *[pointer] * 5, *place]),
    }
    signatures |= {
        "read_rate": (double, [pointer, pointer, long]),
        "multiply_rate": (double, [pointer, integer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"dspark_{name}")
        function.restype, function.argtypes = result, arguments
        setattr(library, name, function)
    return library


def _at(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _ints(values: Sequence[int] | Ints) -> Ints:
    return np.ascontiguousarray(values, dtype=np.int32)


def _must(holds: object, what: str) -> None:
    """Pointers follow: what is not as it must be has to stop here."""
    if not holds:
        raise ValueError(what)


def _done(context: Context, ok: bool) -> None:
    """What a call that can run out of memory, or be asked for rows that cannot be, says."""
    if not ok:
        message = context.library.error().decode()
        raise ValueError(message) if context.library.refused() else MemoryError(message)


class Room:
    """An array that is used again and again: fresh memory costs more than what is written to it, and asking numpy where
    an array lies costs a microsecond, several when a pass has just driven the interpreter out of the caches.
    """

    def __init__(self, dtype: type[np.generic] = np.float32) -> None:
        self._array = np.empty(0, dtype=dtype)
        self.address = 0

    def get(self, *shape: int) -> npt.NDArray[Any]:
        """The room as an array of that shape. Arrays that it gave before may be written over."""
        size = math.prod(shape)
        if len(self._array) < size:
            self._array = np.empty(size, dtype=self._array.dtype)
            self.address = self._array.ctypes.data
        return self._array[:size].reshape(shape)


def _room(out: npt.NDArray[Any] | None, rows: int, width: int) -> Floats:
    """``out[:rows]`` as it must be to be written to, or a new array."""
    if out is None:
        return np.empty((rows, width), dtype=np.float32)
    _must(
        out.dtype == np.float32 and out.ndim == 2 and len(out) >= rows and out.shape[1] == width
        and out.flags.c_contiguous,
        f"no room for {rows} x {width} floats",
    )  # fmt: skip
    return out[:rows]


def _floats(array: npt.NDArray[Any], *shape: int) -> Floats:
    out = np.ascontiguousarray(array, dtype=np.float32)
    if shape and out.shape != shape:
        raise ValueError(f"shape {out.shape}, expected {shape}")
    return out


def _free_with(owner: Any, free: Any, handle: int) -> Any:
    """Free a handle when its owner goes; not at the interpreter's end, when some thread may still be using it."""
    finalizer = weakref.finalize(owner, free, handle)
    finalizer.atexit = False
    return finalizer


class Context:
    """Threads, and the library that they run. Calls on one context must not overlap."""

    def __init__(self, threads: int, isa: Isa, *, sanitize: bool = False) -> None:
        self.library = load(isa, sanitize)
        self.isa, self.threads = isa, threads
        self.handle = self.library.context(threads)
        if not self.handle:
            raise MemoryError(self.library.error().decode())
        _free_with(self, self.library.free_context, self.handle)

    @property
    def kv_bfloat(self) -> bool:
        """Keys, values, queries and attention weights in bfloat16, as the matrix unit takes them; else keys and values
        in float16 and the rest in float32."""
        return self.isa == "amx"

    def read_rate(self, megabytes: int = 256, repeats: int = 5) -> float:
        """Bytes a second that these threads read from memory, the best of some passes over so many MiB."""
        data = np.ones(megabytes << 18, dtype=np.float32)
        return float(max(self.library.read_rate(self.handle, _at(data), data.size) for _ in range(repeats)))

    def multiply_rate(self, repeats: int = 5) -> float:
        """Integer multiply-adds a second of these threads with weights in registers, the best of some runs."""
        return float(max(self.library.multiply_rate(self.handle, 1_000_000) for _ in range(repeats)))


class PackedMatrix:
    """Weights [outputs, inputs] in the kernels' own order.

    Raises:
        ValueError: inputs that are no multiple of the kind's block.
    """

    def __init__(self, context: Context, outputs: int, inputs: int, kind: Kind) -> None:
        if inputs % kind.block or min(outputs, inputs) < 1:
            raise ValueError(f"a packed matrix of {outputs} x {inputs}: inputs must divide by {kind.block}")
        self.context, self.outputs, self.inputs, self.kind = context, outputs, inputs, kind
        self.handle = context.library.matrix(outputs, inputs, kind)
        if not self.handle:
            raise MemoryError(context.library.error().decode())
        self._free = _free_with(self, context.library.free_matrix, self.handle)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return int(self.context.library.matrix_bytes(self.handle))

    def pack(self, data: npt.NDArray[Any], source: Source, rows: Ints | None = None) -> PackedMatrix:
        """Set all channels from rows of ``data``: ``rows[i]``, or i in order. Returns itself.

        Raises:
            ValueError: data too short for the rows, quants of another kind.
        """
        of_floats = source.kind is None and self.kind.block == GROUP
        if not (of_floats or source.kind == self.kind) or self.inputs % source.block:
            raise ValueError(f"{source.name} rows of {self.inputs} do not fit a matrix of kind {self.kind.name}")
        data, count = np.ascontiguousarray(data), self.outputs
        needed = (count if rows is None else int(rows.max(initial=-1)) + 1) * source.nbytes(self.inputs)
        if data.nbytes < needed or (rows is not None and (len(rows) != count or int(rows.min(initial=0)) < 0)):
            raise ValueError(f"{data.nbytes} bytes of {source.name} for {count} rows that need {needed}")
        order = None if rows is None else _ints(rows)
        library, handle = self.context.library, self.context.handle
        _done(self.context, library.pack(handle, self.handle, _at(order), _at(data), int(source)))
        return self

    def take(self, rows: Sequence[int] | Ints) -> PackedMatrix:
        """Some of its channels as a matrix of their own."""
        chosen = self._checked(rows)
        out = PackedMatrix(self.context, len(chosen), self.inputs, self.kind)
        self.context.library.take(self.handle, _at(chosen), len(chosen), out.handle)
        return out

    def rows(self, rows: Sequence[int] | Ints) -> Floats:
        """Channels in full precision [n, inputs]: an embedding."""
        chosen = self._checked(rows)
        out = np.empty((len(chosen), self.inputs), dtype=np.float32)
        self.context.library.rows(self.handle, _at(chosen), len(chosen), _at(out))
        return out

    def _checked(self, rows: Sequence[int] | Ints) -> Ints:
        chosen = _ints(rows)
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.outputs:
            raise ValueError(f"channels outside 0 … {self.outputs - 1}")
        return chosen

    def product(self, x: npt.NDArray[Any], out: Floats | None = None) -> Floats:
        """x [M, inputs] · Wᵀ → [M, outputs], x rounded to 8 bits in groups of 32."""
        x = _floats(x, len(x), self.inputs)
        out = _room(out, len(x), self.outputs)
        if len(x):
            product, handle = self.context.library.product, self.context.handle
            _done(self.context, product(handle, self.handle, _at(x), len(x), _at(out), self.outputs, None))
        return out

    def argmax(self, x: npt.NDArray[Any]) -> Ints:
        """Of each row of `product(x)`, which is never written: the greedy tokens [M]; the first of equal ones."""
        x = _floats(x, len(x), self.inputs)
        best = np.empty(len(x), dtype=np.int32)
        if len(x):
            product, handle = self.context.library.product, self.context.handle
            _done(self.context, product(handle, self.handle, _at(x), len(x), None, 0, _at(best)))
        return best

    def give(self) -> int:
        """The handle, for a model to own."""
        self._free.detach()
        return int(self.handle)


class Table:
    """An embedding [outputs, inputs], of which few rows are read at a time: a packed matrix, or blocks that stay in
    their file. What is read of a file is in the system's cache as a rule, and takes none of the process's memory.

    Raises:
        ValueError: rows that are no whole blocks.
    """

    def __init__(
        self, context: Context, outputs: int, inputs: int, handle: int | None, packed: PackedMatrix | None
    ) -> None:
        if not handle:
            raise MemoryError(context.library.error().decode())
        self.context, self.outputs, self.inputs, self.handle = context, outputs, inputs, handle
        self._packed = packed  # kept for as long as the handle is
        _free_with(self, context.library.free_table, handle)

    @classmethod
    def of(cls, matrix: PackedMatrix) -> Table:
        """The channels of a packed matrix."""
        context = matrix.context
        return cls(context, matrix.outputs, matrix.inputs, context.library.table(matrix.handle), matrix)

    @classmethod
    def in_file(cls, context: Context, outputs: int, inputs: int, source: Source, path: Path, offset: int) -> Table:
        """Rows of ``source`` blocks from ``offset`` of a file on, which must be there."""
        _must(inputs % source.block == 0, f"{source.name} rows of {inputs}")
        with path.open("rb") as file:
            _must(offset >= 0 and offset + outputs * source.nbytes(inputs) <= path.stat().st_size, "rows past the end")
            handle = context.library.file_table(outputs, inputs, int(source), file.fileno(), offset)
        return cls(context, outputs, inputs, handle, None)

    def rows(self, rows: Sequence[int] | Ints) -> Floats:
        """Some rows in full precision [n, inputs].

        Raises:
            ValueError: rows that are not there, in the table or in its file any more.
        """
        chosen = _ints(rows)
        out = np.empty((len(chosen), self.inputs), dtype=np.float32)
        _done(self.context, self.context.library.table_rows(self.handle, _at(chosen), len(chosen), _at(out)))
        return out


class _Edits(ctypes.Structure):
    """`Edits` of csrc/edits.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("entries", "stops")),
        *((name, ctypes.c_int32) for name in ("count", "stop_count", "masked")),
        *((name, ctypes.c_float) for name in ("frequency", "presence", "repetition")),
    )


class _EditList:
    """Edits of N streams as the kernels read them; None for streams that have none.

    Raises:
        ValueError: tokens outside the vocabulary.
    """

    def __init__(self, edits: Sequence[Edits | None], width: int) -> None:
        self._keep = edits
        self._structs: list[_Edits | None] = []
        for edit in edits:
            if edit is None:
                self._structs.append(None)
                continue
            entries, stops = edit.entries, edit.stops
            _must(entries.dtype == EDIT and entries.flags.c_contiguous, "edits of another type")
            _must(stops.dtype == np.int32 and stops.flags.c_contiguous, "stop tokens of another type")
            for tokens in (entries["token"], stops):
                _must(not len(tokens) or 0 <= tokens.min() <= tokens.max() < width, "edits outside the vocabulary")
            self._structs.append(
                _Edits(_at(entries), _at(stops), len(entries), len(stops), *edit[2:]),
            )
        at = [None if s is None else ctypes.addressof(s) for s in self._structs]
        self._pointers = (ctypes.c_void_p * len(at))(*at)
        self.address = ctypes.addressof(self._pointers)


class EditedBlock(NamedTuple):
    """Rows ``first`` … ``first + len(drafts)`` of one stream: each sees the drafts before it."""

    first: int
    drafts: Sequence[int]
    edits: Edits


def edit_rows(context: Context, scores: Floats, blocks: Sequence[EditedBlock]) -> None:
    """Edit some of scores [N, V] where they stand.

    Raises:
        ValueError: rows or tokens that are not there.
    """
    rows, width = scores.shape
    _must(scores.dtype == np.float32 and scores.flags.c_contiguous, "scores of another kind")
    drafts = [token for block in blocks for token in block.drafts]
    for block in blocks:
        _must(block.first >= 0 and block.first + len(block.drafts) < rows, "blocks without rows")
    _must(not drafts or (min(drafts) >= 0 and max(drafts) < width), "drafts outside the vocabulary")
    listed = _EditList([block.edits for block in blocks], width)
    words = _ints([*(b.first for b in blocks), *(len(b.drafts) for b in blocks), *drafts])
    at, count = words.ctypes.data, len(blocks)
    edit = context.library.edit
    _done(
        context,
        edit(context.handle, _at(scores), width, count, at, at + 4 * count, at + 8 * count, listed.address),
    )


def best_tokens(context: Context, scores: Floats, rows: Sequence[int]) -> list[int]:
    """The greatest of each of those rows of scores [N, V], the first of equal ones.

    Raises:
        ValueError: rows that are not there.
    """
    _must(scores.dtype == np.float32 and scores.flags.c_contiguous and scores.shape[1] > 0, "scores of another kind")
    _must(not len(rows) or (min(rows) >= 0 and max(rows) < len(scores)), "rows that are not there")
    count = len(rows)
    words = np.array([*rows, *[0] * count], dtype=np.int32)
    at = words.ctypes.data
    _done(context, context.library.best(context.handle, _at(scores), scores.shape[1], at, count, at + 4 * count))
    found: list[int] = words[count:].tolist()
    return found


def sampling_rows(rows: Sequence[tuple[float, float, float, int]]) -> Floats:
    """What rows are drawn by, as the kernels read it [n, 4]: temperature (0: the greatest), top-p (1: off), min-p (0:
    off), top-k (0: off).
    """
    out = np.empty((len(rows), 4), dtype=np.float32)
    out[:, :3] = [row[:3] for row in rows] or np.empty((0, 3))
    out.view(np.int32)[:, 3] = [min(row[3], 2**31 - 1) for row in rows]
    return out


def noise_rows(rows: Sequence[tuple[int, int]]) -> Longs:
    """Which noise rows race by, as the kernels read it [n, 2]: a stream's seed, of 64 bits, and an output position (-1:
    no race)."""
    out = np.empty((len(rows), 2), dtype=np.int64)
    out.view(np.uint64)[:, 0] = [seed & 0xFFFF_FFFF_FFFF_FFFF for seed, _ in rows]
    out[:, 1] = [position for _, position in rows]
    return out


def race(
    context: Context, scores: Floats, sampling: Floats, noise: Longs, rows: Sequence[int] | Ints | None = None
) -> list[int]:
    """The tokens of least E/p [n] (`reference.race`), p by each row's sampling, E by its noise.

    Who wins depends neither on the other rows nor on the number of threads.

    Args:
        scores: [N, V]; rows that race become weights where they stand, as by `Weights.of`.
        sampling: `sampling_rows` [n, 4], every temperature above 0.
        noise: `noise_rows` [n, 2], all at positions from 0 on.
        rows: which of ``scores`` [n], each once; None: all.
    """
    chosen = np.arange(len(scores), dtype=np.int32) if rows is None else _ints(rows)
    count, width = len(chosen), scores.shape[1]
    _must(scores.dtype == np.float32 and scores.flags.c_contiguous and width > 0, "scores of another kind")
    _must(count == 0 or (chosen.min() >= 0 and chosen.max() < len(scores)), "rows that are not there")
    _must(len(np.unique(chosen)) == count, "a row twice")
    _check_sampling(sampling, count)
    _must((sampling[:, 0] > 0).all(), "a temperature above 0 is needed for every row")
    _check_noise(noise, count)
    _must((noise[:, 1] >= 0).all(), "rows without a position")
    tokens = np.empty(count, dtype=np.int32)
    places = _at(scores), width, _at(chosen), count, _at(sampling), _at(noise), _at(tokens)
    _done(context, context.library.race(context.handle, *places))
    found: list[int] = tokens.tolist()
    return found


class Weights(NamedTuple):
    """N rows that tokens are drawn from: probabilities before they are divided by their sums."""

    context: Context
    values: Floats  # [N, V]
    totals: Doubles  # [N]

    @classmethod
    def of(cls, context: Context, scores: Floats, sampling: Floats) -> Weights:
        """exp(score/temperature), up to a factor, in place of scores [N, V], 0 where a token is cut off.

        ``sampling``: `sampling_rows` [N, 4], every temperature above 0.
        """
        rows, width = scores.shape
        _must(scores.dtype == np.float32 and scores.flags.c_contiguous and width > 0, "scores of another kind")
        _check_sampling(sampling, rows)
        _must((sampling[:, 0] > 0).all(), "a temperature above 0 is needed for every row")
        totals = np.empty(rows)
        _done(context, context.library.weigh(context.handle, _at(scores), rows, width, _at(sampling), _at(totals)))
        return cls(context, scores, totals)

    def probability(self, row: int, token: int) -> float:
        """Of one token of one row."""
        return float(self.values[row, token] / self.totals[row])

    def probabilities(self, row: int) -> Floats:
        """Of one row [V], adding up to 1."""
        out: Floats = self.values[row] * np.float32(1.0 / self.totals[row])
        return out

    def draw(self, row: int, uniform: float) -> int:
        """A token of one row by inverse transform; never one of probability 0. ``uniform``: in [0, 1)."""
        values = self.values[row]
        return int(self.context.library.draw(_at(values), len(values), self.totals[row], uniform))

    def overlap(self, row: int, share: float, q: Floats, ids: Ints | None) -> float:
        """Σ min(share · p, q) of one row; q and ids as for `draw_rest`."""
        self._check(q, ids)
        values, total = self.values[row], self.totals[row]
        library = self.context.library
        return float(library.overlap(_at(values), len(values), total, share, _at(q), _at(ids), len(q)))

    def draw_rest(self, row: int, uniform: float, share: float, q: Floats, ids: Ints | None) -> int:
        """A token of max(share · p - q, 0) of one row, of p where rounding leaves nothing of that.

        Args:
            share: in (0, 1].
            q: probabilities [Vd].
            ids: the tokens that they are of [Vd], ascending; None: all of them.
        """
        self._check(q, ids)
        values, total = self.values[row], self.totals[row]
        library = self.context.library
        return int(library.draw_rest(_at(values), len(values), total, share, _at(q), _at(ids), len(q), uniform))

    def judge(
        self,
        first: int,
        tokens: Sequence[int],
        q: Weights,
        q_first: int,
        indices: Sequence[int],
        ids: Ints | None,
        accept: Sequence[float],
        uniform: float,
    ) -> tuple[int, int]:
        """Block verification (models/distributions.py, `judge`): how many of ℓ ≥ 1 drafts stand, and the bonus token.

        Args:
            first: p of the first draft's row; ℓ + 1 rows from there on.
            tokens: the drafts [ℓ].
            q: what they were drawn from, from row ``q_first`` on, over the tokens ``ids`` (as for `draw_rest`).
            indices: the drafts among ``ids`` [ℓ].
            accept: uniforms [ℓ or more].
            uniform: what the bonus token is drawn by.
        """
        length, width = len(tokens), self.values.shape[1]
        self._check(q.values[q_first], ids)
        _must(0 < length <= min(len(indices), len(accept)), "drafts without indices or uniforms")
        _must(first + length < len(self.values) and q_first + length <= len(q.values), "drafts without rows")
        tokens, among = list(tokens), list(indices[:length])
        _must(min(tokens) >= 0 and max(tokens) < width, "drafts outside the vocabulary")
        _must(min(among) >= 0 and max(among) < q.values.shape[1], "drafts outside the draft vocabulary")
        whole, bonus = ctypes.c_int32 * length, ctypes.c_int32()
        stand = self.context.library.judge(
            *(_at(self.values[first]), _at(self.totals[first:]), width),
            *(_at(q.values[q_first]), _at(q.totals[q_first:]), q.values.shape[1]),
            *(_at(ids), whole(*tokens), whole(*among), length),
            *((ctypes.c_double * length)(*accept[:length]), uniform, ctypes.byref(bonus)),
        )
        if stand < 0:
            raise MemoryError(self.context.library.error().decode())
        return int(stand), bonus.value

    def _check(self, q: Floats, ids: Ints | None) -> None:
        width = self.values.shape[1]
        _must(q.dtype == np.float32 and q.flags.c_contiguous, "probabilities of another kind")
        if ids is None:
            _must(q.shape == (width,), "probabilities of another vocabulary")
        else:
            _must(
                ids.dtype == np.int32 and ids.flags.c_contiguous and ids.shape == q.shape, "ids of other probabilities"
            )
            _must(len(ids) == 0 or 0 <= ids[0] <= ids[-1] < width, "ids outside the vocabulary")


def _check_sampling(sampling: Floats, rows: int) -> None:
    _must(
        sampling.dtype == np.float32 and sampling.shape == (rows, 4) and sampling.flags.c_contiguous,
        "sampling of other rows",
    )


def _check_noise(noise: Longs, rows: int) -> None:
    _must(noise.dtype == np.int64 and noise.shape == (rows, 2) and noise.flags.c_contiguous, "noise of other rows")


class Walked(NamedTuple):
    """What a walk through R blocks of γ slots drafted."""

    tokens: Ints  # [R, γ], target ids
    indices: Ints  # [R, γ], draft vocabulary
    logits: Floats  # [R, γ], of confidence; 0 without a confidence head
    weights: Weights | None
    """Where anybody sampled: R·γ rows that sampled tokens were drawn from; others' rows hold scores."""


class _Heads(ctypes.Structure):
    """`Heads` of csrc/api.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w2", "w1", "confidence", "draft_ids")),
        *((name, ctypes.c_int32) for name in ("rank", "vocabulary", "hidden_size", "with_markov", "w1_of_drafts")),
        ("confidence_bias", ctypes.c_float),
    )


class Head:
    """A drafter's sequential and confidence head: rank r, hidden size H, draft vocabulary Vd.

    Args:
        w1: [V, r], or [Vd, r]: then other tokens' rows are zeros; None without a sequential head.
        w2: [Vd, r].
        confidence: [H] or [H + r]; None without a confidence head.
        draft_ids: [Vd], ascending; None: all of the target's.

    Raises:
        ValueError: sizes that the kernels cannot do, or that do not fit each other.
    """

    def __init__(
        self,
        w1: Halves | None,
        w2: PackedMatrix | None,
        confidence: Floats | None,
        confidence_bias: float,
        draft_ids: Ints | None,
        *,
        vocabulary: int,
        hidden_size: int,
    ) -> None:
        rank = 0 if w1 is None else w1.shape[1]
        _must(hidden_size % LANES == 0 and rank % GROUP == 0 and rank <= LARGEST_RANK, f"sizes {hidden_size}, {rank}")
        _must(draft_ids is None or len(draft_ids) == vocabulary, f"not {vocabulary} draft ids")
        if w2 is not None:
            _must((w2.outputs, w2.inputs) == (vocabulary, rank), "W2 of another size")
        with_markov = confidence is not None and len(confidence) > hidden_size
        if confidence is not None:
            _must(len(confidence) == hidden_size + rank * with_markov, "confidence weights of another size")
        for name, array, dtype in (
            ("W1", w1, np.float16),
            ("confidence weights", confidence, np.float32),
            ("draft ids", draft_ids, np.int32),
        ):
            _must(array is None or (array.dtype == dtype and array.flags.c_contiguous), f"{name} of another type")
        self.w1_of_drafts = w1 is not None and draft_ids is not None and len(w1) == vocabulary
        largest = vocabulary - 1 if draft_ids is None or self.w1_of_drafts else int(draft_ids[-1])
        _must(w1 is None or largest < len(w1), "W1 of a smaller vocabulary")
        self.w1, self.w2, self.confidence, self.draft_ids = w1, w2, confidence, draft_ids
        self.vocabulary, self.hidden_size = vocabulary, hidden_size
        self._struct = _Heads(
            None if w2 is None else w2.handle,
            *map(_at, (w1, confidence, draft_ids)),
            *(rank, vocabulary, hidden_size, with_markov, self.w1_of_drafts),
            confidence_bias,
        )
        self.address = ctypes.addressof(self._struct)

    def walk(
        self,
        context: Context,
        base: Floats,
        hidden: Floats,
        anchors: Ints,
        sampling: Floats | None = None,
        uniforms: Doubles | None = None,
        noise: Longs | None = None,
        edits: Sequence[Edits | None] | None = None,
    ) -> Walked:
        """Drafts of R streams, slot after slot.

        Args:
            base: logits before any bias [R, γ, Vd]; written over where a stream samples or is edited.
            hidden: [R, γ, H].
            anchors: [R].
            sampling: `sampling_rows` [R, 4], temperature 0 for greedy drafts; None: all are.
            uniforms: [R, γ] in [0, 1), for those that sample.
            noise: `noise_rows` [R, 2] at the first slot's position: who has one races instead, under the noise of the
                target's tokens. None: nobody.
            edits: [R], over the draft vocabulary, None for streams without; None: nobody has any.
        """
        streams, gamma, vocabulary = base.shape
        _must(vocabulary == self.vocabulary, "another draft vocabulary")
        _must(hidden.shape == (streams, gamma, self.hidden_size), "hidden states of other streams")
        _must(base.dtype == hidden.dtype == np.float32, "base logits or hidden states that are not float32")
        _must(base.flags.c_contiguous and hidden.flags.c_contiguous, "arrays that are not contiguous")
        _must(anchors.shape == (streams,), "anchors of other streams")
        if self.w1 is not None and len(anchors) and not self.w1_of_drafts:
            _must(0 <= int(anchors.min()) <= int(anchors.max()) < len(self.w1), "anchors outside the vocabulary")
        out = _Drafted(context, self, anchors, gamma, sampling, uniforms, noise, edits)
        library = context.library
        done = library.walk(
            context.handle, self.address, _at(base), _at(hidden), streams, gamma, out.anchors, *out.drawn, *out.places
        )
        _done(context, done)
        return out.walked(base)


class _Drafted:
    """Where R streams' drafts are to be written, and what they are drawn by."""

    def __init__(
        self,
        context: Context,
        head: Head,
        anchors: Ints,
        gamma: int,
        sampling: Floats | None,
        uniforms: Doubles | None,
        noise: Longs | None,
        edits: Sequence[Edits | None] | None,
    ) -> None:
        streams = len(anchors)
        _must(
            anchors.dtype == np.int32 and anchors.flags.c_contiguous and anchors.ndim == 1,
            "anchors that are not int32 in a row",
        )
        self._context = context
        self._keep: list[npt.NDArray[Any]] = [anchors]
        self.anchors = _at(anchors)
        _must(edits is None or len(edits) == streams, "edits of other streams")
        self._edits = _EditList(edits, head.vocabulary) if edits is not None and any(edits) else None
        at_edits = None if self._edits is None else self._edits.address
        self.drawn: tuple[int | None, ...] = (None, None, None, at_edits)
        """Addresses of sampling, uniforms, noise and edits."""
        self._totals: Doubles | None = None
        if sampling is not None and (sampling[:, 0] > 0).any():
            _check_sampling(sampling, streams)
            _must(uniforms is not None and uniforms.shape == (streams, gamma), "uniforms of other streams")
            _must(uniforms is not None and uniforms.dtype == np.float64 and uniforms.flags.c_contiguous, "uniforms")
            assert uniforms is not None
            self._keep += [sampling, uniforms]
            if noise is not None:
                _check_noise(noise, streams)
                self._keep.append(noise)
            self.drawn = _at(sampling), _at(uniforms), _at(noise), at_edits
            self._totals = np.ones(streams * gamma)
        # tokens, indices and confidence logits of four bytes each lie together: one address to ask for
        self._out = np.zeros((3, streams, gamma), dtype=np.int32)
        size, first = self._out.nbytes // 3, self._out.ctypes.data
        self.places = (
            first,
            first + size,
            _at(self._totals),
            first + 2 * size if head.confidence is not None else None,
        )
        """Addresses of tokens, indices, totals and logits."""

    def walked(self, base: Floats) -> Walked:
        """What has come of it; ``base`` [R, γ, Vd]."""
        weights = None
        if self._totals is not None:
            weights = Weights(self._context, base.reshape(len(self._totals), -1), self._totals)
        tokens, indices, logits = self._out
        return Walked(tokens, indices, logits.view(np.float32), weights)


class LayerWeights(NamedTuple):
    """One layer's; None, or 0, where there is none."""

    q: PackedMatrix  # [Hq·D, H]
    k: PackedMatrix  # [Hk·D, H]
    v: PackedMatrix  # [Hk·D, H]
    o: PackedMatrix  # [H, Hq·D]
    gate: PackedMatrix  # [inner, H]
    up: PackedMatrix  # [inner, H]
    down: PackedMatrix  # [H, inner]
    input_norm: npt.NDArray[Any]  # [H]
    post_norm: npt.NDArray[Any]  # [H], before the MLP
    q_norm: npt.NDArray[Any] | None = None  # [D]
    k_norm: npt.NDArray[Any] | None = None  # [D]
    bias: npt.NDArray[Any] | None = None  # [(Hq + 2·Hk)·D], of q, k and v
    after_attention: npt.NDArray[Any] | None = None  # [H], a norm of what attention adds
    after_mlp: npt.NDArray[Any] | None = None  # [H], likewise
    window: int = 0
    """Positions that a row sees at most, itself among them."""
    rope: int = 0
    """Which of the model's rotary embeddings."""


class Pass(NamedTuple):
    """Where T rows stand. Row r sees positions ``begin[r]`` … ``visible[r] - 1`` of its stream, whose first lies at
    slot ``first_slot[r]`` (a multiple of 16). ``begin`` None: 0 for all."""

    position: Ints
    slot: Ints
    first_slot: Ints
    visible: Ints
    begin: Ints | None = None


class Place(NamedTuple):
    """A store's addresses."""

    addresses: tuple[int, int, int, int]
    """Of keys and values, the token slots that they have, and the ring."""
    shape: tuple[int, int, int]
    """Layers, key heads, head size."""
    store: Store
    """Kept for as long as its addresses are."""


class Store(NamedTuple):
    """Keys [L, Hk, N/16, D, 16] and values [L, Hk, N, D] of all token slots, two bytes each.

    Float16, or where `Context.kv_bfloat` bfloat16 with the layout inside 16 slots that csrc/attention.h describes.
    """

    keys: Words
    values: Words
    ring: int = 0
    """Positions of a stream that are kept, a multiple of `RING_GRAIN`: position i at its first slot + i mod ring. 0:
    all."""

    @staticmethod
    def zeros(layers: int, slots: int, kv_heads: int, head_size: int, ring: int = 0) -> Store:
        """Room for ``slots`` (rounded up to whole tiles); costs no memory until it is written."""
        _must(ring >= 0 and ring % RING_GRAIN == 0, f"a ring of {ring}")
        tiles = -(-slots // LANES)
        return Store(
            _untouched(layers, kv_heads, tiles, head_size, LANES),
            _untouched(layers, kv_heads, tiles * LANES, head_size),
            ring,
        )

    @property
    def place(self) -> Place:
        """Where it is, for `Llama.run` and others: asked for once, since it takes time."""
        layers, kv_heads, slots, head_size = self.values.shape
        _must(self.keys.shape == (layers, kv_heads, slots // LANES, head_size, LANES), "keys of other values")
        addresses = self.keys.ctypes.data, self.values.ctypes.data, slots, self.ring
        return Place(addresses, (layers, kv_heads, head_size), self)

    def clear(self, slot: int, size: int) -> None:
        """Zero whole tiles from ``slot`` on."""
        first, last = slot // LANES, -(-(slot + size) // LANES)
        self.keys[:, :, first:last] = 0
        self.values[:, :, first * LANES : last * LANES] = 0


def _untouched(*shape: int) -> Words:
    """Zeros that take memory page by page as they are written.

    Small pages: every head of every layer has a part of its own, and large ones would round each up by megabytes.
    """
    memory = mmap.mmap(-1, max(1, 2 * math.prod(shape)))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint16, count=math.prod(shape)).reshape(shape)


class Rope(NamedTuple):
    """A rotary embedding."""

    frequencies: Doubles  # radians a position [D/2]
    amplitude: float = 1.0
    """Of cosine and sine."""


class Llama:
    """Decoder layers and final norm.

    Args:
        ropes: rotary embeddings; layers say which is theirs.
        positions: how many there are.
        score_scale: of query · key; None: 1/√D.
        gelu: the gate's activation is GELU by tanh, else SiLU.

    Raises:
        ValueError: sizes that the kernels cannot do (they work in groups of 32 and lanes of 16), or weights that do
            not fit them.
    """

    def __init__(
        self,
        context: Context,
        *,
        heads: int,
        kv_heads: int,
        eps: float,
        final_norm: npt.NDArray[Any],
        ropes: Sequence[Rope],
        positions: int,
        layers: Sequence[LayerWeights],
        score_scale: float | None = None,
        gelu: bool = False,
    ) -> None:
        if not layers or not ropes:
            raise ValueError("no layers, or no rotary embedding")
        first = layers[0]
        self.context, self.hidden, self.num_layers = context, first.q.inputs, len(layers)
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, first.q.outputs // heads
        self.inner, self.positions = first.gate.outputs, positions
        d, h = self.head_size, self.hidden
        if d % 32 or d > 256 or h % GROUP or self.inner % GROUP or heads % kv_heads:
            raise ValueError(f"heads of {d}, hidden size {h}, inner size {self.inner} are not for these kernels")
        final = _floats(final_norm, h)
        if any(rope.frequencies.shape != (d // 2,) for rope in ropes):
            raise ValueError(f"rotary frequencies of {[rope.frequencies.shape for rope in ropes]} for heads of {d}")
        frequencies = np.ascontiguousarray([rope.frequencies for rope in ropes], dtype=np.float64)
        amplitudes = np.array([rope.amplitude for rope in ropes], dtype=np.float32)
        library = context.library
        self.handle = library.llama(
            *(h, heads, kv_heads, d, self.inner, self.positions, eps, score_scale or d**-0.5, gelu),
            *(_at(final), _at(frequencies), _at(amplitudes), len(ropes)),
        )
        if not self.handle:
            raise MemoryError(library.error().decode())
        _free_with(self, library.free_llama, self.handle)
        self.nbytes = 0
        """Memory that the layers' matrices take."""
        for layer in layers:
            if not 0 <= layer.rope < len(ropes) or layer.window < 0:
                raise ValueError(f"rotary embedding {layer.rope} or window {layer.window}")
            self._add(layer)

    def _add(self, layer: LayerWeights) -> None:
        h, q, kv, d = self.hidden, self.heads * self.head_size, self.kv_heads * self.head_size, self.head_size
        shapes = {
            "q": (q, h),
            "k": (kv, h),
            "v": (kv, h),
            "o": (h, q),
            "gate": (self.inner, h),
            "up": (self.inner, h),
            "down": (h, self.inner),
        }
        for name, shape in shapes.items():
            matrix: PackedMatrix = getattr(layer, name)
            if (matrix.outputs, matrix.inputs) != shape:
                raise ValueError(f"{name} is {matrix.outputs} x {matrix.inputs}, expected {shape[0]} x {shape[1]}")
        sizes = {"q_norm": d, "k_norm": d, "bias": q + 2 * kv, "after_attention": h, "after_mlp": h}
        vectors: list[Floats | None] = [_floats(layer.input_norm, h), _floats(layer.post_norm, h)]
        for name, size in sizes.items():
            vector = getattr(layer, name)
            vectors.append(None if vector is None else _floats(vector, size))
        self.nbytes += sum(getattr(layer, name).nbytes for name in shapes)
        matrices = (ctypes.c_void_p * len(shapes))(*(getattr(layer, name).give() for name in shapes))
        places = (ctypes.c_void_p * len(vectors))(*map(_at, vectors))
        _done(self.context, self.context.library.add_layer(self.handle, matrices, places, layer.window, layer.rope))

    def forward(self, x: Floats, where: Pass, store: Store, tap_layers: Ints, taps: Floats) -> None:
        """x [T, H] becomes the final hidden states, in place; taps [T, taps·H] those of ``tap_layers``, ascending."""
        self._check(x, where, store)
        _must(taps.shape == (len(x), len(tap_layers) * self.hidden) and tap_layers.dtype == np.int32, "taps")
        _must(taps.dtype == np.float32 and taps.flags.c_contiguous, "taps of another type")
        done = self.context.library.forward(
            self.context.handle,
            self.handle,
            len(x),
            _at(x),
            *map(_at, where),
            *store.place.addresses,
            _at(tap_layers),
            len(tap_layers),
            _at(taps),
        )
        _done(self.context, done)

    def run(
        self,
        embedding: Table,
        lm_head: PackedMatrix,
        where: Sequence[int],
        ids: Sequence[int],
        place: Place,
        tap_layers: Ints,
        taps: Room,
        wanted: Sequence[int] | None = None,
        logits: Room | None = None,
        embedding_scale: float = 1.0,
    ) -> tuple[Floats, Floats | Ints]:
        """A whole pass in one call, in which every row sees what comes before it in its stream, and itself.

        Args:
            where: of R streams, one after the other: first slot, position of its first row, its rows.
            ids: tokens of all rows [T].
            place: `Store.place`.
            tap_layers: -1 is the embedding.
            taps: where tapped states go.
            wanted: rows whose logits are wanted [n]; None: all.
            logits: where they go; None: only the best token of each wanted row is.

        Returns:
            Taps [T, taps·H], and logits [n, V] or best tokens [n].

        Raises:
            ValueError: tokens, positions or slots that are not there.
        """
        rows, streams = len(ids), len(where) // 3
        self._check_sizes(place, embedding.inputs, lm_head.inputs)
        _must(tap_layers.dtype == np.int32 and tap_layers.flags.c_contiguous, "tap layers that are not int32")
        count = rows if wanted is None else len(wanted)
        words = np.array([*where, *ids, *(wanted or ()), *[0] * count], dtype=np.int32)  # the last: for the best
        _must(sum(where[2::3]) == rows, "ids of other rows")
        at = words.ctypes.data
        at_ids = at + 12 * streams
        at_wanted = at_ids + 4 * rows
        tapped = taps.get(rows, len(tap_layers) * self.hidden)
        scores = None if logits is None else logits.get(count, lm_head.outputs)
        done = self.context.library.run(
            self.context.handle,
            self.handle,
            embedding.handle,
            embedding_scale,
            lm_head.handle,
            streams,
            at,
            at_ids,
            *place.addresses,
            tap_layers.ctypes.data if len(tap_layers) else None,
            len(tap_layers),
            taps.address,
            None if wanted is None else at_wanted,
            count,
            None if logits is None else logits.address,
            at_wanted + (0 if wanted is None else 4 * count) if logits is None else None,
        )
        _done(self.context, done)
        best: Ints = words[len(words) - count :]
        return tapped, best if scores is None else scores

    def draft(
        self,
        embedding: Table,
        lm_head: PackedMatrix,
        head: Head,
        mask: int,
        gamma: int,
        where: Sequence[int],
        anchors: Sequence[int],
        place: Place,
        base: Room,
        sampling: Floats | None = None,
        uniforms: Doubles | None = None,
        noise: Longs | None = None,
        embedding_scale: float = 1.0,
        window: int = 0,
        edits: Sequence[Edits | None] | None = None,
    ) -> Walked:
        """Blocks of γ drafts for R streams in one call: anchor and masks through layers, LM head and `Head.walk`.

        Args:
            mask: the token of all slots but the first.
            where: of R streams, one after the other: first slot, the anchor's position, γ.
            anchors: [R].
            place: `Store.place`.
            base: where base logits go; `Walked.weights` are a view of it, good until it is next written to.
            sampling: see `Head.walk`; ``uniforms``, ``noise`` and ``edits`` likewise.
            window: positions before the anchor that a block sees; 0: all.

        Raises:
            ValueError: tokens, positions or slots that are not there.
        """
        self._check_sizes(place, embedding.inputs, lm_head.inputs)
        _must(gamma > 0, "blocks without slots")
        _must(len(where) == 3 * len(anchors) and all(rows == gamma for rows in where[2::3]), "blocks of other streams")
        _must(head.w1 is None or head.w1_of_drafts or len(head.w1) >= embedding.outputs, "W1 of a smaller vocabulary")
        _must(lm_head.outputs == head.vocabulary and head.hidden_size == self.hidden, "heads of another drafter")
        streams = len(anchors)
        words = np.array([*anchors, *where], dtype=np.int32)
        out = _Drafted(self.context, head, words[:streams], gamma, sampling, uniforms, noise, edits)
        scores = base.get(streams, gamma, lm_head.outputs)
        done = self.context.library.draft(
            self.context.handle,
            self.handle,
            embedding.handle,
            embedding_scale,
            lm_head.handle,
            head.address,
            mask,
            streams,
            gamma,
            (out.anchors or 0) + 4 * streams,
            window,
            out.anchors,
            *place.addresses,
            base.address,
            *out.drawn,
            *out.places,
        )
        _done(self.context, done)
        return out.walked(scores)

    def append_context(
        self,
        fc: PackedMatrix,
        norm: Floats,
        taps: Floats,
        positions: Sequence[int],
        slots: Sequence[int],
        place: Place,
    ) -> None:
        """Keys and values of context features, every layer, at ``slots`` [T], from taps [T, fc.inputs].

        Args:
            place: `Store.place`.

        Raises:
            ValueError: positions or slots that are not there.
        """
        taps = _floats(taps, len(taps), fc.inputs)
        self._check_sizes(place, fc.outputs)
        _must(len(positions) == len(slots) == len(taps), "positions or slots of other rows")
        _must(norm.dtype == np.float32 and norm.shape == (self.hidden,), "norm")
        words = np.array([*positions, *slots], dtype=np.int32)
        at = words.ctypes.data
        done = self.context.library.append_context(
            self.context.handle,
            self.handle,
            fc.handle,
            _at(norm),
            len(taps),
            _at(taps),
            at,
            at + 4 * len(taps),
            *place.addresses,
        )
        _done(self.context, done)

    def _check(self, x: Floats, where: Pass, store: Store) -> None:
        _must(x.dtype == np.float32 and x.shape[1:] == (self.hidden,) and x.flags.c_contiguous, "rows")
        for name, array in where._asdict().items():
            if array is None and name == "begin":
                continue
            _must(array.dtype == np.int32 and array.shape == (len(x),) and array.flags.c_contiguous, name)
        self._check_sizes(store.place)

    def _check_sizes(self, place: Place, *widths: int) -> None:
        """A store of this model, and matrices of its width."""
        _must(place.shape == (self.num_layers, self.kv_heads, self.head_size), "a store of another model")
        _must(all(width == self.hidden for width in widths), f"matrices that are not of width {self.hidden}")
