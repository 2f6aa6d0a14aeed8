"""Native libraries that are compiled on the user's machine, once for each version of their source."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_ROOM = 16 << 20
"""Bytes that are free where a library is kept."""


class CompilerError(Exception):
    """A library cannot be made here; the message has the compiler's words."""


def folder() -> Path:
    """Where built libraries lie: ``$XDG_CACHE_HOME/dspark-stream/kernels``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "dspark-stream" / "kernels"


def digest(source: Path, *more: object) -> str:
    """Of all files of a source folder and of what else the library depends on."""
    found = hashlib.sha256(repr(more).encode())
    for path in sorted(source.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def compile_library(library: Path, command: Callable[[Path], Sequence[str]]) -> Path:
    """Build ``library`` with the compiler call that ``command`` makes for an output path; it appears whole or not.

    Where its folder cannot hold it (read-only, or full) it is built in a folder of this process, which ends with it.

    Returns where it is.

    Raises:
        CompilerError: the compiler failed, or no folder can be written.
    """
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(library.parent).free) < _ROOM:
            raise OSError(f"{free >> 20} MiB are free")
        return _compile(library, command)
    except OSError as error:
        why = error.strerror or str(error)
        log.warning("the kernels cannot be kept in %s (%s): they will be compiled at every start", library.parent, why)
    try:
        own = Path(tempfile.mkdtemp(prefix="dspark-kernels-"))  # nobody else can put a library there
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return _compile(own / library.name, command)
    except OSError as error:
        raise CompilerError(f"{library.name} cannot be built: {error}") from error


def _compile(library: Path, command: Callable[[Path], Sequence[str]]) -> Path:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        part = Path(scratch) / library.name
        words = [*command(part)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompilerError(f"{' '.join(words)} failed:\n{done.stderr.strip()[-4000:]}")
        part.replace(library)
    return library
