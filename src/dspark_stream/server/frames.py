"""Rules of RFC 6455 that aiohttp's frame reader lets clients break."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp.http import WebSocketReader

_BROKEN = b"\xf0\x80\0\0\0\0"
"""A frame with all reserved bits set: the reader answers it, as any other broken rule, with 1002."""
_LONG = {126: 2, 127: 8}
"""Bytes of an extended length, by what stands in the short one's place."""


def may_be_sent(code: int) -> bool:
    """Whether a peer may close with this code: the others are reserved, or stand for "none was received"."""
    return (1000 <= code <= 1014 and code not in (1004, 1005, 1006)) or 3000 <= code <= 4999


class FrameCheck:
    """Stands before the reader and follows the frames' heads: a client's frames are masked."""

    def __init__(self, reader: WebSocketReader) -> None:
        self._reader = reader
        self._head = b""
        """The beginning of a head whose end has not come."""
        self._left = 0
        """Bytes of the current frame that have not come."""
        self.broken = False
        """Whether a frame has broken a rule; the reader then takes no more."""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Pass whole heads and what lies between them on."""
        data = self._head + data
        at, end = self._left, len(data)
        while at + 2 <= end:
            flags = data[at + 1]
            if not flags & 0x80:
                return self._pass_on(data[:at] + _BROKEN)
            length = flags & 0x7F
            extended = _LONG.get(length, 0)
            if at + 2 + extended > end:
                break
            if extended:
                length = int.from_bytes(data[at + 2 : at + 2 + extended])
            at += 2 + extended + 4 + length
        self._head, self._left = data[at:], max(0, at - end)
        return self._pass_on(data[:at])

    def feed_eof(self) -> None:
        """The client has gone."""
        self._reader.feed_eof()

    def _pass_on(self, data: bytes) -> tuple[bool, bytes]:
        self.broken, rest = self._reader.feed_data(data)
        return self.broken, rest


class LastWords:
    """A transport that, once a rule was broken, closes for writing first.

    Whoever sent too much is still sending: closing at once would be a reset, and a reset takes the close frame, which
    says what was wrong, from a client that has not read it.
    """

    def __init__(self, transport: asyncio.Transport, frames: FrameCheck, linger_s: float) -> None:
        self._transport = transport
        self._frames = frames
        self._linger_s = linger_s
        self._closing = False

    def close(self) -> None:
        """Close now, or when the client has: at the latest after ``linger_s`` seconds."""
        if not self._frames.broken or self._transport.is_closing():
            self._transport.close()
        elif not self._closing:
            self._closing = True
            self._transport.write_eof()
            self._transport.resume_reading()  # what comes is thrown away
            asyncio.get_running_loop().call_later(self._linger_s, self._transport.close)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
