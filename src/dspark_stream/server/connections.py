"""One connection: how long it may keep us waiting, and what is said where its parser refuses a head.

aiohttp's `RequestHandler` reads and answers requests, but waits for ever for a head and for a reader, and tells log
and client what it could not parse. `Connection` closes these gaps. It leans on a few names that aiohttp keeps to
itself: its version is pinned, and each gap has a test of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol, cast

from aiohttp import web
from aiohttp.http import HttpProcessingError, RawRequestMessage, WebSocketReader
from aiohttp.web_protocol import PayloadAccessError
from aiohttp.web_request import BaseRequest

from dspark_stream.errors import BusyError, DsparkError, InternalError, OverloadedError
from dspark_stream.server.delivery import bound_buffers
from dspark_stream.server.frames import CrowdedTurns, FrameCheck, LastWords
from dspark_stream.server.heads import HeadTooLargeError, RequestTimeoutError, error_response, refusal, whole_answer
from dspark_stream.server.metrics import Metrics
from dspark_stream.server.seldom import Seldom
from dspark_stream.server.settings import ServerConfig

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
"""Of a request's head in all; aiohttp bounds only its lines and their number."""
MAX_HALF_HEADS = 64 << 20
"""Bytes of all heads together whose end has not come; past it the longest gives way. Nearly every head comes whole."""
LINGER_S = 2.0
"""How long the rest of a body that nobody wants is read, so that its sender sees the answer."""
RESERVE_HEAD_TIMEOUT_S = 2.0
"""For connections beyond the limits, which are there for probes."""


class Owner(Protocol):
    """Who counts connections (server/listener.py)."""

    config: ServerConfig
    manager: web.Server
    metrics: Metrics
    refused: Seldom
    half_heads: int
    crowds: CrowdedTurns

    def admit(self, connection: Connection, peername: object) -> BusyError | None:
        """It has come; what it is told if it may only ask for the service's health."""

    def lost(self, connection: Connection) -> None:
        """It has gone."""

    def busy(self, connection: Connection) -> None:
        """It has a request in hand."""

    def idle(self, connection: Connection) -> None:
        """Its requests are answered."""

    def longest_half_head(self) -> Connection | None:
        """Whoever holds the most bytes of a head whose end has not come."""


class Connection(web.RequestHandler):
    """One connection and its limits."""

    def __init__(self, listener: Owner) -> None:
        self._listener = listener
        self._limits = limits = listener.config
        super().__init__(
            listener.manager,
            loop=asyncio.get_running_loop(),
            # Ours comes first: it is counted, and begins anew with the first byte of a head.
            keepalive_timeout=limits.keep_alive_timeout_s + 2 * limits.head_timeout_s,
            lingering_time=LINGER_S,
            # Nothing is unpacked for somebody who has not shown a key; nor, as it is, for anybody.
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's own default for "none"
        )
        self.limited: BusyError | None = None
        """What any request but a probe is told, where the limits of connections are reached."""
        self.in_hand = False
        """A whole head is here, and its answer has not been written."""
        self._wire: asyncio.Transport | None = None
        """``transport``, which aiohttp lets go of before the last byte has left."""
        self._head_timeout_s = limits.head_timeout_s
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    # --- coming and going ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._wire = cast(asyncio.Transport, transport)
        bound_buffers(self._wire, self._limits)
        self.limited = self._listener.admit(self, transport.get_extra_info("peername"))
        if self.limited is not None:
            self._head_timeout_s = min(self._head_timeout_s, RESERVE_HEAD_TIMEOUT_S)
        self._arm("head_timeout", self._head_timeout_s)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The transport is closed."""
        self._wire = None
        self._disarm()
        self._count_head(-self._head_bytes)
        self._listener.lost(self)
        super().connection_lost(exc)

    async def start(self) -> None:
        """Serve requests until the connection is to close; then what is unsent gets as long as a slow reader does."""
        try:
            await super().start()
        finally:
            self._arm("unread", self._limits.slow_reader_timeout_s)

    def refuse_if_limited(self) -> None:
        """Raise what is said, for the lack of connections, to whoever wants more than the service's health."""
        if self.limited is not None:
            raise self.limited

    def abort(self) -> None:
        """End it now; what was not sent is lost."""
        if self._wire is not None:
            self._wire.abort()

    def cut(self, reason: str) -> None:
        """End it for a reason, which is counted."""
        self._listener.metrics.connections_cut[reason] += 1
        if reason == "head_timeout" and self._head_bytes:
            self._say_and_close(RequestTimeoutError("the request's head did not arrive in time"))
        elif self._wire is not None and self._wire.get_write_buffer_size():
            self.abort()
        else:
            self.force_close()

    def _say_and_close(self, error: DsparkError) -> None:
        if self._wire is not None and not self._wire.is_closing():
            self._wire.write(whole_answer(error))
        self.force_close()

    def _arm(self, reason: str, seconds: float) -> None:
        self._disarm()
        if self._wire is not None:
            self._timer = self._loop.call_later(seconds, self.cut, reason)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- reading ------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, of a body or, after an upgrade, of frames."""
        if self._payload_parser is not None:
            super().data_received(data)
            return
        # A head that has just come is still being waited for until its task runs: what follows meanwhile is its body.
        expected, heads = self._waiter is not None and not self._waiter.done(), self._request_count
        try:
            super().data_received(data)
        except Exception as error:
            # Not one of the parser's own errors: it fell over something.
            self._count_refusal(error)
            self.force_close()
            return
        if self._request_count != heads:
            self._count_head(-self._head_bytes)
            self.in_hand = True
            self._disarm()
            self._listener.busy(self)
            self._fail_broken_body()
        elif expected and data:
            if not self._head_bytes:
                self._arm("head_timeout", self._head_timeout_s)
            self._count_head(len(data))
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head(HeadTooLargeError(f"the request's head is longer than {MAX_HEAD_BYTES} bytes"))
            elif self._listener.half_heads > MAX_HALF_HEADS:
                busy = OverloadedError("too many requests have begun and not come; try again in a moment")
                (self._listener.longest_half_head() or self)._refuse_head(busy)

    @property
    def head_bytes(self) -> int:
        """What has come of a head whose end has not."""
        return self._head_bytes

    def _refuse_head(self, error: DsparkError) -> None:
        self._listener.metrics.heads_refused[error.code] += 1
        self._count_head(-self._head_bytes)
        self._say_and_close(error)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        self._listener.half_heads += size

    def set_parser(self, parser: WebSocketReader, data_received_cb: Callable[[], None] | None = None) -> None:
        """From here on the client sends frames."""
        frames = FrameCheck(parser, self, self._listener.crowds)
        if self._wire is not None:
            self.transport = cast(asyncio.Transport, LastWords(self._wire, frames, LINGER_S))
        super().set_parser(cast(WebSocketReader, frames), data_received_cb)

    @property
    def stalled(self) -> bool:
        """Whether enough is decoded that nobody has taken yet."""
        return self._reading_paused

    def hold_reading(self) -> None:
        """Read no more until `release_reading`."""
        self._pause_reading_for_buffer()

    def release_reading(self) -> None:
        """Go on reading."""
        self._resume_reading_for_buffer()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """What was decoded has been taken."""
        super().resume_reading(resume_parser)
        if isinstance(self._payload_parser, FrameCheck):
            self._payload_parser.resume()

    def _fail_broken_body(self) -> None:
        # aiohttp puts the parser's error behind the request that it belongs to, whose handler still waits for a body.
        if not self._messages or isinstance(self._messages[-1][0], RawRequestMessage):
            return
        current = self._current_request
        body = self._messages[-2][1] if len(self._messages) > 1 else current.content if current is not None else None
        if body is not None and not body.is_eof():
            self._listener.metrics.heads_refused["invalid_body"] += 1
            self._listener.refused.count()
            body.set_exception(web.RequestPayloadError("the body is malformed"))

    # --- answering ----------------------------------------------------------------------------------------

    async def finish_response(
        self, request: BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write a plain answer, within the time that a slow reader gets; streams have their own watch."""
        if self.limited is not None:
            resp.force_close()
        if self._wire is not None and not self._wire.is_closing():
            self._wire.set_write_buffer_limits(high=0)  # the last byte counts too
        try:
            async with asyncio.timeout(self._limits.slow_reader_timeout_s):
                written = await super().finish_response(request, resp, start_time)
                await request.writer.drain()
                return written
        except ConnectionError:
            return resp, True
        except TimeoutError:
            self._listener.metrics.connections_cut["unread"] += 1
            self.abort()
            return resp, True
        finally:
            if not self._messages:
                self.in_hand = False
                self._listener.idle(self)
                self._arm("idle_timeout", self._limits.keep_alive_timeout_s)

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what could not be parsed: it repeats nothing, nor does the log."""
        if isinstance(exc, HttpProcessingError):
            self._count_refusal(exc)
            error: DsparkError = refusal(exc)
        else:
            log.error("a request failed outside of its handler", exc_info=exc)
            error = InternalError("the server failed on this request")
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        self._keepalive = False
        return error_response(error)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """What aiohttp cannot handle. A broken body is the client's, and its text is in the exception."""
        noise = (web.RequestPayloadError, PayloadAccessError, HttpProcessingError, ConnectionError)
        if not isinstance(kw.get("exc_info"), noise):
            super().log_exception(*args, **kw)

    def _count_refusal(self, error: BaseException) -> None:
        self._listener.metrics.heads_refused[refusal(error).code] += 1
        self._listener.refused.count()
