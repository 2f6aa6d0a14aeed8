"""GGUF files, read in place: metadata and where each tensor's blocks lie. Format: ggml's docs/gguf.md, version 2 and 3.

The format's own Python library keeps an object for every element of every array; a vocabulary of 49,152 takes it
seconds. This one reads the same file in a tenth of one.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_stream.errors import ModelLoadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 12: (256, 144),
          13: (256, 176), 14: (256, 210), 30: (1, 2)}  # fmt: skip
"""Weights of a block and its bytes, by tensor type (F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16)."""
LARGEST_COUNT = 2**24


class TensorInfo(NamedTuple):
    """Where a tensor lies. ``shape`` is row-major as torch has it: outputs first."""

    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


class GgufFile:
    """One file, mapped; closing is the garbage collector's.

    Raises:
        ModelLoadError: not a GGUF file, cut short, or inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelLoadError(f"{path} cannot be read: {error}", param="model") from error
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, IndexError, KeyError, ValueError, OverflowError) as error:
            raise ModelLoadError(f"{path} is not a readable GGUF file: {error}", param="model") from error

    def _parse(self) -> None:
        reader = _Reader(self._map)
        if reader.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, tensor_count, field_count = reader.unpack("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not one of {VERSIONS}")
        for count in (tensor_count, field_count):
            if count > LARGEST_COUNT:
                raise ValueError(f"{count} entries")
        for _ in range(field_count):
            name = reader.string()
            self.fields[name] = reader.value(reader.unpack("I")[0])
        infos = []
        for _ in range(tensor_count):
            name = reader.string()
            (dimensions,) = reader.unpack("I")
            shape = reader.unpack(f"{dimensions}Q") if dimensions <= 4 else ()
            kind, offset = reader.unpack("IQ")
            if not shape or kind not in BLOCKS:
                raise ValueError(f"tensor {name} has {dimensions} dimensions and type {kind}")
            weights, size = BLOCKS[kind]
            if shape[0] % weights:
                raise ValueError(f"tensor {name}: rows of {shape[0]} are no whole blocks of {weights}")
            infos.append((name, shape[::-1], kind, offset, int(np.prod(shape, dtype=object)) // weights * size))
        alignment = int(self.fields.get("general.alignment", 32))
        if alignment < 1:
            raise ValueError(f"alignment {alignment}")
        start = -(-reader.at // alignment) * alignment
        for name, shape, kind, offset, nbytes in infos:
            if start + offset + nbytes > len(self._map):
                raise ValueError(f"the file ends within tensor {name}")
            self.tensors[name] = TensorInfo(tuple(shape), kind, start + offset, nbytes)

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's blocks, in place.

        Raises:
            ModelLoadError: there is no such tensor.
        """
        info = self.tensor(name)
        return np.frombuffer(self._map, dtype=np.uint8, count=info.nbytes, offset=info.offset)

    def tensor(self, name: str) -> TensorInfo:
        """Where a tensor lies.

        Raises:
            ModelLoadError: there is no such tensor.
        """
        if name not in self.tensors:
            raise ModelLoadError(f"{self.path} has no tensor {name}", param="model")
        return self.tensors[name]

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """A small tensor (a norm) in full precision.

        Raises:
            ModelLoadError: there is no such tensor, or it is quantised.
        """
        info, raw = self.tensor(name), self.bytes_of(name)
        if info.type == 0:
            values: Any = raw.view(np.float32)
        elif info.type == 1:
            values = raw.view(np.float16).astype(np.float32)
        elif info.type == 30:
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            raise ModelLoadError(f"{self.path}: {name} is quantised (type {info.type})", param="model")
        shaped: npt.NDArray[np.float32] = values.reshape(info.shape)
        return shaped


class _Reader:
    """Little-endian values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self._data):
            raise ValueError("it ends too early")
        out = self._data[self.at : end]
        self.at = end
        return out

    def unpack(self, form: str) -> tuple[Any, ...]:
        form = "<" + form
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def string(self) -> str:
        return self.take(self.unpack("Q")[0]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.unpack(SCALARS[kind])[0]
        inner, count = self.unpack("IQ")
        if count > LARGEST_COUNT:
            raise ValueError(f"an array of {count}")
        if inner in SCALARS:
            return list(self.unpack(f"{count}{SCALARS[inner]}"))
        return [self.value(inner) for _ in range(count)]
