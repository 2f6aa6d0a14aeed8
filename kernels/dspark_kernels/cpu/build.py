"""Compile the kernels with the system's compiler, once for each instruction set and version of the source.

The libraries go to the user's cache, named by a hash of source and flags, so a changed source is built anew and two
processes never see half a file; one that is there needs no compiler any more. `python -m dspark_kernels.cpu` builds the
one for this machine; with ``--bundle`` those for all machines, into the package: for images without a compiler.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from pathlib import Path
from typing import Literal

from dspark_kernels.compiling import CompilerError, compile_library, digest, folder
from dspark_kernels.cpu.machine import cpu_flags

Isa = Literal["amx", "avx512", "avx2", "portable"]

SOURCE = Path(__file__).parent / "csrc"
BUNDLED = Path(__file__).parent / "built"
"""Libraries that came with the installation; looked at before the cache."""
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fvisibility=hidden")
AVX512 = tuple(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "cd", "vnni"))
COMMON = ("-mfma", "-mf16c", "-mbmi2")
ISA_FLAGS: dict[Isa, tuple[str, ...]] = {
    "amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16", *COMMON),
    "avx512": (*AVX512, *COMMON),
    "avx2": ("-mavx2", *COMMON),
    "portable": (),
}
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni", "f16c"})
NEEDS: dict[Isa, frozenset[str]] = {
    "amx": _AVX512 | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
    "avx512": _AVX512,
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi2"}),
    "portable": frozenset(),
}
# Hardly optimised: more would take longer than all that then runs, and so would less.
SANITIZERS = (
    "-Og",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)


class NoCompilerError(Exception):
    """No library for this machine can be made: no compiler, or it failed. The message says which."""


def supported_isas() -> list[Isa]:
    """What this machine can run, the fastest first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["portable"]
    flags = cpu_flags()
    return [isa for isa, needs in NEEDS.items() if needs <= flags]


def best_isa() -> Isa:
    """The fastest that this machine can run."""
    return supported_isas()[0]


def compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, else g++, c++ or clang++; None where there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        words = shlex.split(name)
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    return None


def library_path(isa: Isa, *, sanitize: bool = False) -> Path:
    """Where the library for ``isa`` lies once it is built."""
    name = f"dspark-{isa}-{digest(SOURCE, _flags(isa, sanitize), platform.machine())}.so"
    return bundled if (bundled := BUNDLED / name).exists() else folder() / name


def _flags(isa: Isa, sanitize: bool) -> tuple[str, ...]:
    return (*FLAGS, *ISA_FLAGS[isa], *(SANITIZERS if sanitize else ()))


def build(isa: Isa, *, sanitize: bool = False, into: Path | None = None) -> Path:
    """The library for ``isa``, built if it is not there yet; ``into``: a folder other than the cache.

    Raises:
        NoCompilerError: there is no compiler, or it failed; the message has its words.
    """
    library = library_path(isa, sanitize=sanitize)
    if into is not None:
        library = into / library.name
    if library.exists():
        return library
    found = compiler()
    if found is None:
        raise NoCompilerError("no C++ compiler was found: on Debian and Ubuntu, apt-get install g++")
    try:
        return compile_library(
            library, lambda out: [*found, *_flags(isa, sanitize), "-o", str(out), str(SOURCE / "api.cpp")]
        )
    except CompilerError as error:
        raise NoCompilerError(str(error)) from error
