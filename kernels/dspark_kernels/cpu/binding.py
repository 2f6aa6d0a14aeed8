"""The C++ library as Python calls it: its functions' types, its threads, and arrays as it takes them.

What the kernels compute is said in `reference.py`. Pointers cross here, so shapes and types are checked on this side.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_kernels.cpu.build import Isa, NoCompilerError, build

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Words = npt.NDArray[np.uint16]
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


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


def ptr(array: npt.NDArray[Any] | None) -> int | None:
    """Where it lies."""
    return None if array is None else array.ctypes.data


def int32s(values: Sequence[int] | Ints) -> Ints:
    """As the kernels take rows and tokens."""
    return np.ascontiguousarray(values, dtype=np.int32)


def must(holds: object, what: str) -> None:
    """Pointers follow: what is not as it must be has to stop here."""
    if not holds:
        raise ValueError(what)


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


class Rooms:
    """Float arrays that somebody keeps for a while: each is used again when nobody has it any more."""

    KEPT = 2**24
    """Bytes that wait to be used again at most; the largest go first."""

    def __init__(self) -> None:
        self.address = 0
        self._free: defaultdict[int, list[tuple[memoryview, int]]] = defaultdict(list)
        """By bytes: memory that nobody has, and where it lies."""

    def get(self, *shape: int) -> npt.NDArray[Any]:
        """An array of that shape that nobody else has."""
        wanted = math.prod(shape)
        size = max(4, 4 << (wanted - 1).bit_length())
        try:
            memory, self.address = self._free[size].pop()
        except IndexError:
            array = np.empty(size, dtype=np.uint8)
            memory, self.address = array.data, array.ctypes.data
        # every view of it, and every tensor, holds this very array: numpy looks through arrays alone for what is held
        base = np.frombuffer(memory, dtype=np.float32, count=wanted)
        weakref.finalize(base, self._take_back, memory, self.address).atexit = False  # those that live then are in use
        return base.reshape(shape)

    def _take_back(self, memory: memoryview, address: int) -> None:
        self._free[memory.nbytes].append((memory, address))
        with contextlib.suppress(IndexError, ValueError):  # another thread took it: whichever lets go comes here
            while sum(len(free) * size for size, free in [*self._free.items()]) > self.KEPT:
                self._free[max(size for size, free in [*self._free.items()] if free)].pop()


def room_for(out: npt.NDArray[Any] | None, rows: int, width: int) -> Floats:
    """``out[:rows]`` as it must be to be written to, or a new array."""
    if out is None:
        return np.empty((rows, width), dtype=np.float32)
    must(
        out.dtype == np.float32 and out.ndim == 2 and len(out) >= rows and out.shape[1] == width
        and out.flags.c_contiguous,
        f"no room for {rows} x {width} floats",
    )  # fmt: skip
    return out[:rows]


def floats(array: npt.NDArray[Any], *shape: int) -> Floats:
    """As the kernels take them, of that shape."""
    out = np.ascontiguousarray(array, dtype=np.float32)
    if shape and out.shape != shape:
        raise ValueError(f"shape {out.shape}, expected {shape}")
    return out


class Context:
    """Threads, and the library that they run. Calls on one context must not overlap."""

    def __init__(self, threads: int, isa: Isa, *, sanitize: bool = False) -> None:
        self.library = load(isa, sanitize)
        self.isa, self.threads = isa, threads
        self.handle = self.library.context(threads)
        self.own(self, "context", self.handle)

    def check(self, ok: bool) -> None:
        """What a call that can run out of memory, or be asked for rows that cannot be, says."""
        if not ok:
            message = self.library.error().decode()
            raise ValueError(message) if self.library.refused() else MemoryError(message)

    def own(self, owner: Any, kind: str, handle: int | None) -> Any:
        """Free a new handle when its owner goes; not at the interpreter's end, when some thread may still be using it.

        Raises:
            MemoryError: there is none.
        """
        if not handle:
            raise MemoryError(self.library.error().decode())
        finalizer = weakref.finalize(owner, getattr(self.library, f"free_{kind}"), handle)
        finalizer.atexit = False
        return finalizer

    @property
    def kv_bfloat(self) -> bool:
        """Keys, values, queries and attention weights in bfloat16, as the matrix unit takes them; else keys and values
        in float16 and the rest in float32."""
        return self.isa == "amx"

    def read_rate(self, megabytes: int = 256, repeats: int = 5) -> float:
        """Bytes a second that these threads read from memory, the best of some passes over so many MiB."""
        data = np.ones(megabytes << 18, dtype=np.float32)
        return float(max(self.library.read_rate(self.handle, ptr(data), data.size) for _ in range(repeats)))

    def multiply_rate(self, repeats: int = 5) -> float:
        """Integer multiply-adds a second of these threads with weights in registers, the best of some runs."""
        return float(max(self.library.multiply_rate(self.handle, 1_000_000) for _ in range(repeats)))
