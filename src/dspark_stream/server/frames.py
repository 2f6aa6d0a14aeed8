"""Rules of RFC 6455 that aiohttp's frame reader lets clients break, and turns for those who send crowds of frames."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from aiohttp.http import WebSocketReader

_BROKEN = b"\xf0\x80\0\0\0\0"
"""A frame with all reserved bits set: the reader answers it, as any other broken rule, with 1002."""
_LONG = {126: 2, 127: 8}
"""Bytes of an extended length, by what stands in the short one's place."""
MOST_AT_ONCE = 16
"""Frames of one socket at a time: what is read at once may hold 40,000, each of which may get an answer."""


def may_be_sent(code: int) -> bool:
    """Whether a peer may close with this code: the others are reserved, or stand for "none was received"."""
    return (1000 <= code <= 1014 and code not in (1004, 1005, 1006)) or 3000 <= code <= 4999


class Source(Protocol):
    """The connection that frames come from."""

    @property
    def stalled(self) -> bool:
        """Whether enough is decoded that nobody has taken yet."""

    def hold_reading(self) -> None:
        """Read no more from the client."""

    def release_reading(self) -> None:
        """Go on reading."""


class CrowdedTurns:
    """Sockets that have sent more frames than are taken at once: a few of one, and the loop goes round.

    However many such sockets there are, everybody else waits for one of these turns at most.
    """

    def __init__(self) -> None:
        self._waiting: dict[FrameCheck, None] = {}
        self._coming = False

    def add(self, frames: FrameCheck) -> None:
        """It goes on when it is its turn."""
        self._waiting[frames] = None
        if not self._coming:
            self._coming = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self._coming = False
        frames = next(iter(self._waiting))
        del self._waiting[frames]
        frames.go_on()
        if self._waiting:
            self.add(next(iter(self._waiting)))


class FrameCheck:
    """Stands before the reader and follows the frames' heads: a client's frames are masked, and come a few at once."""

    def __init__(self, reader: WebSocketReader, source: Source, turns: CrowdedTurns) -> None:
        self._reader = reader
        self._source = source
        self._turns = turns
        self._head = b""
        """The beginning of a head whose end has not come."""
        self._left = 0
        """Bytes of the current frame that have not come."""
        self._crowd = memoryview(b"")
        """From the first frame on that has to wait for a turn; nothing is read meanwhile."""
        self.broken = False
        """Whether a frame has broken a rule; the reader then takes no more."""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Pass whole heads and what lies between them on; of a crowd of frames the first."""
        if not self._crowd:
            return self._take(memoryview(self._head + data))
        self._crowd = memoryview(bytes(self._crowd) + data)  # it was on its way
        return self.broken, b""

    def feed_eof(self) -> None:
        """The client has gone."""
        self._crowd = memoryview(b"")
        self._reader.feed_eof()

    def resume(self) -> None:
        """What was decoded has been taken."""
        if self._crowd:
            self._turns.add(self)

    def go_on(self) -> None:
        """Take a few more frames of the crowd, unless there is no room: then `resume` comes."""
        if not self._crowd or self._source.stalled:
            return
        crowd, self._crowd = self._crowd, memoryview(b"")
        self._take(crowd)
        if not self._crowd:
            self._source.release_reading()

    def _take(self, data: memoryview) -> tuple[bool, bytes]:
        self._head = b""
        at, end = self._left, len(data)
        for _ in range(MOST_AT_ONCE):
            if at + 2 > end:
                break
            flags = data[at + 1]
            if not flags & 0x80:
                return self._pass_on(bytes(data[:at]) + _BROKEN)
            length = flags & 0x7F
            extended = _LONG.get(length, 0)
            if at + 2 + extended > end:
                break
            if extended:
                length = int.from_bytes(data[at + 2 : at + 2 + extended])
            at += 2 + extended + 4 + length
        else:
            if at < end:
                self._left, self._crowd = 0, data[at:]
                self._source.hold_reading()
                self._turns.add(self)
                return self._pass_on(bytes(data[:at]))
        self._head, self._left = bytes(data[at:]), max(0, at - end)
        return self._pass_on(bytes(data[:at]))

    def _pass_on(self, data: bytes) -> tuple[bool, bytes]:
        self.broken, rest = self._reader.feed_data(data)
        if self.broken and self._crowd:
            self._crowd = memoryview(b"")
            self._source.release_reading()  # no turn comes that would
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
