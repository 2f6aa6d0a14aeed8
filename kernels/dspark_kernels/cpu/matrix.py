"""Packed matrices: weights of 4 to 8 bits and the products with them; embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_kernels.cpu.binding import Context, Floats, Ints, floats, int32s, must, ptr, room_for

GROUP = 32
"""Weights that share a scale; inputs of every matrix are a multiple of it."""


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
        self._free = context.own(self, "matrix", self.handle)

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
        order = None if rows is None else int32s(rows)
        library, handle = self.context.library, self.context.handle
        self.context.check(library.pack(handle, self.handle, ptr(order), ptr(data), int(source)))
        return self

    def take(self, rows: Sequence[int] | Ints) -> PackedMatrix:
        """Some of its channels as a matrix of their own."""
        chosen = self._checked(rows)
        out = PackedMatrix(self.context, len(chosen), self.inputs, self.kind)
        self.context.library.take(self.handle, ptr(chosen), len(chosen), out.handle)
        return out

    def rows(self, rows: Sequence[int] | Ints) -> Floats:
        """Channels in full precision [n, inputs]: an embedding."""
        chosen = self._checked(rows)
        out = np.empty((len(chosen), self.inputs), dtype=np.float32)
        self.context.library.rows(self.handle, ptr(chosen), len(chosen), ptr(out))
        return out

    def _checked(self, rows: Sequence[int] | Ints) -> Ints:
        chosen = int32s(rows)
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.outputs:
            raise ValueError(f"channels outside 0 … {self.outputs - 1}")
        return chosen

    def product(self, x: npt.NDArray[Any], out: Floats | None = None) -> Floats:
        """x [M, inputs] · Wᵀ → [M, outputs], x rounded to 8 bits in groups of 32."""
        x = floats(x, len(x), self.inputs)
        out = room_for(out, len(x), self.outputs)
        if len(x):
            product, handle = self.context.library.product, self.context.handle
            self.context.check(product(handle, self.handle, ptr(x), len(x), ptr(out), self.outputs, None))
        return out

    def argmax(self, x: npt.NDArray[Any]) -> Ints:
        """Of each row of `product(x)`, which is never written: the greedy tokens [M]; the first of equal ones."""
        x = floats(x, len(x), self.inputs)
        best = np.empty(len(x), dtype=np.int32)
        if len(x):
            product, handle = self.context.library.product, self.context.handle
            self.context.check(product(handle, self.handle, ptr(x), len(x), None, 0, ptr(best)))
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
        self.context, self.outputs, self.inputs, self.handle = context, outputs, inputs, handle
        self._packed = packed  # kept for as long as the handle is
        context.own(self, "table", handle)

    @classmethod
    def of(cls, matrix: PackedMatrix) -> Table:
        """The channels of a packed matrix."""
        context = matrix.context
        return cls(context, matrix.outputs, matrix.inputs, context.library.table(matrix.handle), matrix)

    @classmethod
    def in_file(cls, context: Context, outputs: int, inputs: int, source: Source, path: Path, offset: int) -> Table:
        """Rows of ``source`` blocks from ``offset`` of a file on, which must be there."""
        must(inputs % source.block == 0, f"{source.name} rows of {inputs}")
        with path.open("rb") as file:
            must(offset >= 0 and offset + outputs * source.nbytes(inputs) <= path.stat().st_size, "rows past the end")
            handle = context.library.file_table(outputs, inputs, int(source), file.fileno(), offset)
        return cls(context, outputs, inputs, handle, None)

    def rows(self, rows: Sequence[int] | Ints) -> Floats:
        """Some rows in full precision [n, inputs].

        Raises:
            ValueError: rows that are not there, in the table or in its file any more.
        """
        chosen = int32s(rows)
        out = np.empty((len(chosen), self.inputs), dtype=np.float32)
        self.context.check(self.context.library.table_rows(self.handle, ptr(chosen), len(chosen), ptr(out)))
        return out
