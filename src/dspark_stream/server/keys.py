"""Who holds which key: the one of the settings, those of a file that is read again when it changes, and the metrics'.

A key is kept as its digest alone, and looked up by it: how far a wrong one's digest agrees says nothing about a key.
What is told of it, in logs and metrics, is its label.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from dspark_stream.errors import ConfigError

log = logging.getLogger(__name__)

MAX_FILE_BYTES, MAX_KEYS, MAX_KEY_CHARS = 1 << 20, 1000, 512
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(rf"[\x21-\x7e]{{1,{MAX_KEY_CHARS}}}")


class Key(msgspec.Struct, frozen=True):
    """One key, without the key."""

    label: str
    """Empty: the one key of the settings, whose clients are told apart by their addresses."""
    digest: bytes
    """SHA-256."""
    max_streams: int | None = None
    """Streams at once; None: as many as the settings say."""


def digest_of(key: bytes) -> bytes:
    """What is compared: neither a length nor a prefix of a key shows in the time that it takes."""
    return hashlib.sha256(key).digest()


class KeyRing:
    """All keys that open the API. Empty: none is asked for.

    Raises:
        ConfigError: the file cannot be read, or a line of it cannot be a key.
    """

    def __init__(self, api_key: str = "", file: Path | None = None) -> None:
        self._own = [Key("" if file is None else "default", digest_of(api_key.encode()))] if api_key else []
        self._file = file
        self._keys = _by_digest(self._own)
        self._seen: object = None
        self._complained: object = None
        if file is not None:
            self._seen = _mark(file)
            self._keys = _by_digest(self._own + _checked(self._own, read_keys(file)))

    @property
    def asked_for(self) -> bool:
        """Whether a key is needed at all. A file that has become empty lets nobody in."""
        return bool(self._keys) or self._file is not None

    @property
    def limits(self) -> Mapping[str, int]:
        """Label → streams at once, where a key has a limit of its own."""
        return {key.label: key.max_streams for key in self._keys.values() if key.max_streams is not None}

    def find(self, shown: Iterable[bytes]) -> Key | None:
        """The first of those shown that is one."""
        known = (self._keys.get(digest_of(key)) for key in shown)
        return next((key for key in known if key is not None), None)

    def reload(self) -> frozenset[str] | None:
        """Read the file again if it has changed; a broken one is told of once, and leaves the keys as they were.

        Returns the labels whose keys are gone, None where nothing was taken over.
        """
        if self._file is None or (mark := _mark(self._file)) == self._seen:
            return None
        try:
            keys = _by_digest(self._own + _checked(self._own, read_keys(self._file)))
        except ConfigError as error:
            if self._complained != mark:
                self._complained = mark
                log.error("the key file has changed and cannot be used, the keys stay as they were: %s", error)
            return None
        before, self._keys, self._seen = self._keys, keys, mark
        log.info("the key file was read again: %d keys", len(keys))
        held = {(key.label, key.digest) for key in keys.values()}
        return frozenset(key.label for key in before.values() if (key.label, key.digest) not in held)

    async def watch(self, changed: Callable[[frozenset[str]], None], poll_s: float) -> None:
        """Reload whenever the file has changed, for ever; ``changed`` hears which labels' keys are gone."""
        while self._file is not None:
            await asyncio.sleep(poll_s)
            gone = self.reload()
            if gone is not None:
                changed(gone)


def read_keys(file: Path) -> list[Key]:
    """The keys of a file: ``key`` or ``label:key`` a line, ``max_streams=N`` behind it; ``#`` begins a comment.

    A key without a label is called ``key-`` and the first 8 digits of its SHA-256, wherever its line is.

    Raises:
        ConfigError: unreadable, too long, or a line that cannot be a key. It names the line, and never what is on it.
    """
    try:
        # Not a pipe, which could keep the loop waiting when it is read again.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read(MAX_FILE_BYTES + 1) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise _bad(f"{file} cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):
        raise _bad(f"{file} is no regular file")
    if len(data) > MAX_FILE_BYTES:
        raise _bad(f"{file} has more than {MAX_FILE_BYTES} bytes")
    if mode & 0o077:
        log.warning("%s can be read by other users: chmod 600 keeps its keys to you", file)
    keys: list[Key] = []
    for number, line in enumerate(data.splitlines(), 1):
        text = line.decode("utf-8", "replace").strip()
        if not text or text.startswith("#"):
            continue
        keys.append(_read_line(text, f"{file}, line {number}"))
        if len(keys) > MAX_KEYS:
            raise _bad(f"{file} has more than {MAX_KEYS} keys")
    if not keys:
        raise _bad(f"{file} has no key")
    for what, values in (("label", [key.label for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise _bad(f"{file}: two lines have the same {what}")
    return keys


def _read_line(text: str, where: str) -> Key:
    words = text.split()
    label, colon, key = words[0].partition(":")
    if not colon:
        label, key = f"key-{digest_of(words[0].encode()).hex()[:8]}", words[0]
    if not _LABEL.fullmatch(label):
        raise _bad(f"{where}: a label is 1 to 64 letters, digits, dots, dashes and underscores")
    if not _KEY.fullmatch(key):
        raise _bad(f"{where}: a key is 1 to {MAX_KEY_CHARS} printable ASCII characters without spaces")
    most = None
    for word in words[1:]:
        found = re.fullmatch(r"max_streams=([1-9]\d{0,6})", word)
        if found is None or most is not None:
            raise _bad(f"{where}: behind the key only max_streams=N may stand, once, with N from 1 to 9999999")
        most = int(found[1])
    return Key(label, digest_of(key.encode()), most)


def _by_digest(keys: Iterable[Key]) -> dict[bytes, Key]:
    return {key.digest: key for key in keys}


def _checked(own: list[Key], keys: list[Key]) -> list[Key]:
    if any(key.label == mine.label or key.digest == mine.digest for key in keys for mine in own):
        raise _bad(f"the label {own[0].label!r} and its key are those of --api-key: they may not be in the file")
    return keys


def _mark(file: Path) -> object:
    """What changes when a file does; editors and secret stores put another one in its place."""
    try:
        status = file.stat()
    except OSError as error:
        return error.errno
    return status.st_ino, status.st_size, status.st_mtime_ns


def _bad(message: str) -> ConfigError:
    return ConfigError(message, param="api_key_file")
