"""GGUF files that are damaged in every part, by a seed: each loads, or is refused in one line.

`test_gguf_damage.py` does it to a tiny file. On real ones, of which a copy is damaged and never the file itself:

    PYTHONPATH=src:kernels:tests python -m gguf_damage MODEL.gguf … --seed 1 --cases 200
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dspark_kernels.cpu import Context, best_isa
from dspark_stream.errors import DsparkError
from dspark_stream.models.cache import Extent
from dspark_stream.models.gguf import ARRAY, SCALARS, STRING, TYPES
from dspark_stream.models.loading import load_target
from dspark_stream.models.protocols import Rows

SIZES = {kind: struct.calcsize(form) for kind, form in SCALARS.items()}
HUGE = (2**31, 2**32 - 1, 2**40, 2**62, 2**64 - 1)


class Field(NamedTuple):
    """Where one stands: its name, its type's four bytes, and its value."""

    name: str
    at: int
    type_at: int
    value_at: int
    end: int
    kind: int


class Tensor(NamedTuple):
    """Where an entry of the table stands: dimensions, type and offset."""

    name: str
    at: int
    shape_at: int
    dimensions: int
    type_at: int
    end: int


class Layout:
    """Where everything stands in a sound file."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 24
        tensors, fields = struct.unpack_from("<QQ", data, 8)
        self.fields = [self._field() for _ in range(fields)]
        self.tensors = [self._tensor() for _ in range(tensors)]
        self.end = self._at

    def _take(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def _string(self) -> str:
        size = self._take("<Q")
        self._at += size
        return self._data[self._at - size : self._at].decode()

    def _field(self) -> Field:
        at, name, type_at = self._at, self._string(), self._at
        kind = self._take("<I")
        value_at = self._at
        self._skip(kind)
        return Field(name, at, type_at, value_at, self._at, kind)

    def _skip(self, kind: int) -> None:
        if kind in SIZES:
            self._at += SIZES[kind]
        elif kind == STRING:
            self._string()
        else:
            inner, count = self._take("<I"), self._take("<Q")
            for _ in range(count):
                self._skip(inner)

    def _tensor(self) -> Tensor:
        at, name = self._at, self._string()
        dimensions, shape_at = self._take("<I"), self._at
        self._at += 8 * dimensions
        type_at = self._at
        self._at += 12
        return Tensor(name, at, shape_at, dimensions, type_at, self._at)


class Damage(NamedTuple):
    """What is done to a file: bytes put in place of others, or its length cut."""

    said: str
    at: int = 0
    put: bytes = b""
    cut: int | None = None


def damages(data: bytes, size: int, seed: int) -> Iterator[Damage]:
    """Without end. ``data``: the file's beginning, all of its header; ``size`` of the whole file."""
    chance, layout = random.Random(seed), Layout(data)
    ways: list[Callable[[random.Random, bytes, Layout, int], Damage]] = [
        _cut, _turn, _head, _type_of_field, _value, _value, _array, _element, _element, _name, _dimension, _dimension,
        _type_of_tensor, _offset, _blocks,
    ]  # fmt: skip
    while True:
        yield chance.choice(ways)(chance, data, layout, size)


def _cut(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    cut = chance.choice((chance.randrange(layout.end), chance.randrange(size), size - chance.randint(1, 64)))
    return Damage(f"cut to {cut}", cut=cut)


def _turn(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    at = chance.randrange(layout.end)
    return Damage(f"byte {at} turned", at, bytes([data[at] ^ 1 << chance.randrange(8)]))


def _head(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    at, was = chance.choice(((4, "<I"), (8, "<Q"), (16, "<Q")))
    (value,) = struct.unpack_from(was, data, at)
    new = chance.choice((0, 1, value - 1, value + 1, 2**24, 2**32 - 1)) % 2 ** (8 * struct.calcsize(was))
    return Damage(f"{('version', 'tensors', 'fields')[at // 8]} {new}", at, struct.pack(was, new))


def _type_of_field(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    field, kind = chance.choice(layout.fields), chance.randrange(15)
    return Damage(f"{field.name} of type {kind}", field.type_at, struct.pack("<I", kind))


def _value(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    field = chance.choice([f for f in layout.fields if f.kind != ARRAY])
    if field.kind == STRING:
        if chance.random() < 0.3:
            new = chance.choice((0, 1, *HUGE))
            return Damage(f"{field.name} of {new} bytes", field.value_at, struct.pack("<Q", new))
        text = bytes(chance.choice(b"\xff{%}a \x00") for _ in range(field.end - field.value_at - 8))
        return Damage(f"{field.name} rubbish", field.value_at + 8, text)
    return Damage(*_scalar(chance, field.name, field.kind, field.value_at))


def _scalar(chance: random.Random, name: str, kind: int, at: int) -> tuple[str, int, bytes]:
    form = SCALARS[kind]
    new: float | int
    if form in "fd":
        new = chance.choice((0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf")))
    elif form == "?":
        new = chance.randrange(2)
    else:
        bits = 8 * SIZES[kind]
        low = -(1 << bits - 1) if form.islower() else 0
        new = chance.choice((0, 1, 3, low, low + (1 << bits) - 1, chance.randrange(1 << min(bits - 1, 20))))
    return f"{name} {new}", at, struct.pack("<" + form, new)


def _array(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    arrays = [f for f in layout.fields if f.kind == ARRAY]
    if not arrays:
        return _value(chance, data, layout, size)
    field = chance.choice(arrays)
    if chance.random() < 0.4:
        kind = chance.randrange(14)
        return Damage(f"{field.name} of elements of type {kind}", field.value_at, struct.pack("<I", kind))
    (count,) = struct.unpack_from("<Q", data, field.value_at + 4)
    new = chance.choice((0, 1, count - 1, count + 1, 2**24, *HUGE))
    return Damage(f"{field.name} of {new} elements", field.value_at + 4, struct.pack("<Q", new))


def _element(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    arrays = [f for f in layout.fields if f.kind == ARRAY]
    if not arrays:
        return _value(chance, data, layout, size)
    field = chance.choice(arrays)
    kind, count = struct.unpack_from("<IQ", data, field.value_at)
    if kind in SIZES and count:
        i = chance.randrange(count)
        return Damage(*_scalar(chance, f"{field.name}[{i}]", kind, field.value_at + 12 + i * SIZES[kind]))
    first = field.value_at + 12
    at = chance.randrange(first, field.end)
    put = bytes(chance.choice((data[first + 8], 0, 32, 255, 65)) for _ in range(chance.choice((1, 1, 3, 40))))
    return Damage(f"{len(put)} bytes at {at} in {field.name}", at, put[: field.end - at])


def _name(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    entry = chance.choice((*layout.fields, *layout.tensors))
    other = chance.choice((*layout.fields, *layout.tensors))
    new = chance.choice((other.name, "x" + entry.name[1:], entry.name[:-1] + "\x00")).encode()[: len(entry.name)]
    return Damage(f"{entry.name} called {new!r}", entry.at + 8, new)


def _dimension(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    tensor = chance.choice(layout.tensors)
    if chance.random() < 0.2:
        new = chance.choice((0, 1, 2, 3, 4, 5, 2**31))
        return Damage(f"{tensor.name} of {new} dimensions", tensor.shape_at - 4, struct.pack("<I", new))
    at = tensor.shape_at + 8 * chance.randrange(tensor.dimensions)
    (was,) = struct.unpack_from("<Q", data, at)
    new = chance.choice((0, 1, was // 2, 2 * was, was + 32, *HUGE))
    return Damage(f"{tensor.name}: {new} for {was}", at, struct.pack("<Q", new))


def _type_of_tensor(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    tensor, new = chance.choice(layout.tensors), chance.choice((*TYPES, 4, 99, 2**31))
    return Damage(f"{tensor.name} of type {new}", tensor.type_at, struct.pack("<I", new))


def _offset(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    tensor, other = chance.choice(layout.tensors), chance.choice(layout.tensors)
    (theirs,) = struct.unpack_from("<Q", data, other.type_at + 4)
    new = chance.choice((0, theirs, theirs + 32, theirs + 1, size, *HUGE))
    return Damage(f"{tensor.name} at {new}", tensor.type_at + 4, struct.pack("<Q", new))


def _blocks(chance: random.Random, data: bytes, layout: Layout, size: int) -> Damage:
    at = chance.randrange(layout.end, size - 4096)
    what = chance.choice((b"\xff" * 4096, b"\x00\x7e" * 2048, b"\x00\x7c" * 2048, bytes(4096)))
    return Damage(f"weights from {at}: {what[:2].hex()}", at, what)


class Outcome(NamedTuple):
    """What became of a damaged file."""

    kind: str
    """loaded, refused; or what it may not be: a traceback, too many lines, died, hung."""
    said: str
    seconds: float
    more_mb: float


def attempt(path: Path, patience_s: float, kernels: bool = True) -> Outcome:
    """Load the file and let it read and write a few tokens, in a process of its own."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(path, kernels, theirs))
    begun = time.monotonic()
    child.start()
    theirs.close()
    try:
        if not ours.poll(patience_s):
            return Outcome("hung", "", time.monotonic() - begun, 0.0)
        kind, said, more_mb = ours.recv()
        return Outcome(kind, said, time.monotonic() - begun, more_mb)
    except EOFError:
        child.join()
        return Outcome("died", f"exit code {child.exitcode}", time.monotonic() - begun, 0.0)
    finally:
        child.kill()
        child.join()


def _in_child(path: Path, kernels: bool, pipe: object) -> None:
    logging.disable(logging.CRITICAL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        loaded = load_target(str(path), kernels=Context(1, best_isa()) if kernels else None, device="cpu")
        ids = [0]
        if loaded.codec is not None:
            ids = loaded.codec.encode_chat([("user", "Hello, world 123")])[:20]
            loaded.codec.decode(ids)
        target = loaded.target
        ids = [i for i in ids if i < target.vocab_size][: target.max_positions] or [0]
        out = target.forward([Rows(Extent(0, 32), 0, ids)], target.make_store(32))
        out.best(range(len(ids)))
        kind, said = "loaded", ""
    except DsparkError as error:
        said = str(error)
        kind = "refused" if "\n" not in said and len(said) < 500 else "too many lines"
    except BaseException:
        kind, said = "a traceback", traceback.format_exc()
    more_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    pipe.send((kind, said, more_mb))  # type: ignore[attr-defined]


def sweep(
    path: Path, folder: Path, cases: int, seed: int, patience_s: float, kernels: bool = True
) -> Iterator[tuple[Damage, Outcome]]:
    """Damage a copy in ``folder``, again and again; each time it is sound before."""
    copy = folder / path.name
    shutil.copyfile(path, copy)
    with copy.open("rb") as file:
        data = file.read(64 << 20)
    size = copy.stat().st_size
    for _, damage in zip(range(cases), damages(data, size, seed), strict=False):
        with copy.open("r+b") as file:
            file.seek(damage.at)
            was = file.read(len(damage.put))
            file.seek(damage.at)
            file.write(damage.put)
            if damage.cut is not None:
                file.truncate(damage.cut)
        yield damage, attempt(copy, patience_s, kernels)
        if damage.cut is not None:
            shutil.copyfile(path, copy)
            continue
        with copy.open("r+b") as file:
            file.seek(damage.at)
            file.write(was)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that one may take")
    parser.add_argument(
        "--more-mb", type=float, default=0.0, help="memory that one may take; 0: half of the sound file's more"
    )
    args = parser.parse_args()
    wrong = 0
    for path in args.models:
        sound = attempt(path, args.patience)
        most_mb = args.more_mb or 1.5 * sound.more_mb + 64
        print(f"{path.name}: {sound.kind} in {sound.seconds:.1f} s, {sound.more_mb:.0f} MB", flush=True)
        kinds: Counter[str] = Counter()
        slowest = most = 0.0
        with tempfile.TemporaryDirectory() as folder:
            for damage, outcome in sweep(path, Path(folder), args.cases, args.seed, args.patience):
                kinds[outcome.kind] += 1
                slowest, most = max(slowest, outcome.seconds), max(most, outcome.more_mb)
                if outcome.kind not in ("loaded", "refused") or outcome.more_mb > most_mb:
                    wrong += 1
                    print(f"  {damage.said}: {outcome.kind}, {outcome.more_mb:.0f} MB\n{outcome.said}", flush=True)
        print(f"  {dict(kinds)}; slowest {slowest:.1f} s, most {most:.0f} MB", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
