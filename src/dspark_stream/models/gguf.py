"""GGUF files, read in place: metadata and where each tensor's blocks lie. Format: ggml's docs/gguf.md, version 2 and 3.
A model that was split (``NAME-00001-of-0000N.gguf``) is one file here, whichever shard it is asked for by.

The format's own Python library keeps an object for every element of every array; a vocabulary of 49,152 takes it
seconds. This one reads the same file in a tenth of one.
"""

from __future__ import annotations

import math
import mmap
import re
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
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Name, weights of a block and its bytes, by tensor type."""
LARGEST_COUNT = 2**24
SHARD_NAME = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def type_name(kind: int) -> str:
    """What a tensor type is called."""
    return TYPES[kind][0] if kind in TYPES else f"type {kind}"


class TensorInfo(NamedTuple):
    """Where a tensor lies. ``shape`` is row-major as torch has it: outputs first."""

    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int
    shard: int = 0
    """Of a split model: in which file."""

    @property
    def type_name(self) -> str:
        """Q4_K, F16, …"""
        return type_name(self.type)


class GgufFile:
    """One model, mapped; closing is the garbage collector's.

    Raises:
        ModelLoadError: not a GGUF file, cut short, or inconsistent; or a shard of a split model that is missing or
            belongs to another one.
    """

    def __init__(self, path: Path) -> None:
        shards = [_Shard(path)]
        count = shards[0].count
        if count > 1:
            names = _shard_names(path, count)
            if shards[0].number != names.index(path.name):
                raise _DamagedError(path, f"split.no is {shards[0].number}, which is not what its name says")
            shards = [shards[0] if name == path.name else _Shard(path.with_name(name), path) for name in names]
            _check_together(shards)
        self.paths = tuple(shard.path for shard in shards)
        """All files of the model."""
        self.path = self.paths[0]
        split = SHARD_NAME.fullmatch(self.path.name) if count > 1 else None
        self.name = split["name"] if split else path.stem
        self.fields: dict[str, Any] = shards[0].fields
        self.tensors: dict[str, TensorInfo] = {
            name: info._replace(shard=i) for i, shard in enumerate(shards) for name, info in shard.tensors.items()
        }
        self._maps = [shard.map for shard in shards]

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's blocks, in place.

        Raises:
            ModelLoadError: there is no such tensor.
        """
        info = self.tensor(name)
        return np.frombuffer(self._maps[info.shard], dtype=np.uint8, count=info.nbytes, offset=info.offset)

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
            raise ModelLoadError(f"{self.path}: {name} is quantised ({info.type_name})", param="model")
        shaped: npt.NDArray[np.float32] = values.reshape(info.shape)
        return shaped


class _DamagedError(ModelLoadError):
    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} is not a readable GGUF file: {what}", param="model")


def _shard_names(path: Path, count: int) -> list[str]:
    """File names of all shards, from the name of one."""
    named = SHARD_NAME.fullmatch(path.name)
    if named is None or int(named["count"]) != count or not 1 <= int(named["number"]) <= count:
        raise ModelLoadError(
            f"{path} is one of {count} shards (split.count); they are found by names like "
            f"NAME-00001-of-{count:05d}.gguf, which this one does not have",
            param="model",
        )
    return [f"{named['name']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def _check_together(shards: list[_Shard]) -> None:
    """Shards of one model: numbered in order, agreeing in every field that two of them have, all tensors there."""
    first = shards[0]
    seen: dict[str, Path] = {}
    for i, shard in enumerate(shards):
        if (shard.number, shard.count) != (i, len(shards)):
            raise ModelLoadError(
                f"{shard.path} says it is shard {shard.number + 1} of {shard.count} (split.no, split.count), not "
                f"{i + 1} of {len(shards)}",
                param="model",
            )
        for name, value in shard.fields.items():
            if name != "split.no" and first.fields.get(name, value) != value:
                raise ModelLoadError(f"{shard.path} belongs to another model than {first.path}: {name}", param="model")
        for name in shard.tensors:
            if name in seen:
                raise ModelLoadError(f"{shard.path} and {seen[name]} both have tensor {name}", param="model")
            seen[name] = shard.path
    total = first.fields.get("split.tensors.count", len(seen))
    if total != len(seen):
        raise ModelLoadError(
            f"{first.path}: its {len(shards)} shards have {len(seen)} tensors, split.tensors.count says {total}",
            param="model",
        )


class _Shard:
    """One file. ``asked``: the shard beside which it should lie."""

    def __init__(self, path: Path, asked: Path | None = None) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            beside = f": it is a shard of the same model as {asked.name}" if asked else ""
            raise ModelLoadError(f"{path} is missing{beside}", param="model") from error
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelLoadError(f"{path} cannot be read: {error}", param="model") from error
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._parse()
            self.number, self.count = self._whole("split.no", 0), self._whole("split.count", 1)
        except RecursionError as error:
            raise _DamagedError(path, "arrays within arrays without end") from error
        except (struct.error, ValueError, OverflowError) as error:
            raise _DamagedError(path, str(error)) from error

    def _whole(self, name: str, default: int) -> int:
        """A field that is a whole number."""
        value = self.fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} is {value!r}")
        return value

    def _parse(self) -> None:
        reader = _Reader(self.map)
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
            if name in self.fields:
                raise ValueError(f"field {name} is there twice")
            try:
                self.fields[name] = reader.value(reader.unpack("I")[0])
            except ValueError as error:
                raise ValueError(f"field {name}: {error}") from error
        self._parse_tensors(reader, tensor_count)

    def _parse_tensors(self, reader: _Reader, count: int) -> None:
        infos = []
        for _ in range(count):
            name = reader.string()
            (dimensions,) = reader.unpack("I")
            if not 1 <= dimensions <= 4:
                raise ValueError(f"tensor {name} has {dimensions} dimensions")
            shape = reader.unpack(f"{dimensions}Q")
            kind, offset = reader.unpack("IQ")
            if kind not in TYPES:
                raise ValueError(f"tensor {name} has the unknown type {kind}")
            kind_name, weights, size = TYPES[kind]
            if shape[0] % weights:
                raise ValueError(f"tensor {name}: rows of {shape[0]} are no whole blocks of {weights} ({kind_name})")
            infos.append((name, shape[::-1], kind, offset, math.prod(shape) // weights * size))
        alignment = self._whole("general.alignment", 32)
        if alignment < 1:
            raise ValueError(f"general.alignment is {alignment}")
        start = -(-reader.at // alignment) * alignment
        for name, shape, kind, offset, nbytes in infos:
            if name in self.tensors:
                raise ValueError(f"tensor {name} is there twice")
            if offset % alignment:
                raise ValueError(f"tensor {name} begins at {offset}, no multiple of general.alignment {alignment}")
            if start + offset + nbytes > len(self.map):
                raise ValueError(f"the file ends within tensor {name}")
            self.tensors[name] = TensorInfo(tuple(shape), kind, start + offset, nbytes)


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
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])[0]
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        inner, count = self.unpack("IQ")
        if count > LARGEST_COUNT:
            raise ValueError(f"an array of {count}")
        if inner in SCALARS:
            return list(self.unpack(f"{count}{SCALARS[inner]}"))
        if inner == STRING:
            return self.strings(count)
        return [self.value(inner) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        """So many strings, in one loop: a vocabulary has hundreds of thousands."""
        data, at, out = self._data, self.at, []
        size_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            end = at + 8 + size_at(data, at)[0] if at + 8 <= len(data) else len(data) + 1
            if end > len(data):
                raise ValueError("it ends too early")
            out.append(data[at + 8 : end].decode("utf-8"))
            at = end
        self.at = at
        return out
