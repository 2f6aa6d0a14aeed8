"""Native libraries that are compiled on the user's machine, once for each version of their source."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


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

    Raises:
        CompilerError: the compiler failed, or the folder cannot be written.
    """
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            part = Path(scratch) / library.name
            words = [*command(part)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompilerError(f"{' '.join(words)} failed:\n{done.stderr.strip()[-4000:]}")
            part.replace(library)
    except OSError as error:
        raise CompilerError(f"{library} cannot be built: {error}") from error
    return library
