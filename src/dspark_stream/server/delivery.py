"""The one writer of a client. The engine never waits for it: what a slow reader has not taken is merged, then held."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

from dspark_stream.engine.boundary import Engine
from dspark_stream.server import wire
from dspark_stream.server.metrics import Metrics
from dspark_stream.server.outbox import Outbox
from dspark_stream.server.settings import ServerConfig

Write = Callable[[wire.ServerEvent], Awaitable[None]]


class SlowReaderError(Exception):
    """The client did not read for too long; its connection is to be closed."""


def bound_buffers(transport: asyncio.Transport, config: ServerConfig) -> None:
    """Keep what lies between us and a reader small, so that a reader who stops is noticed soon."""
    if transport.is_closing():
        return
    transport.set_write_buffer_limits(high=config.write_buffer_bytes)
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, config.send_buffer_bytes)


class Delivery:
    """Takes events at any rate, writes them at the reader's, and holds the reader's streams while it is behind."""

    def __init__(
        self,
        write: Write,
        *,
        engine: Engine,
        config: ServerConfig,
        metrics: Metrics,
        idle: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.outbox = Outbox()
        self._write = write
        self._engine = engine
        self._config = config
        self._metrics = metrics
        self._idle = idle
        self._streams: set[str] = set()
        self._text_at: dict[str, float] = {}
        """When each open message was last sent text."""
        self._held_since: float | None = None
        self._something = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._finishing = False

    # --- the reader's streams -----------------------------------------------------------------------------

    def add_stream(self, response_id: str) -> None:
        """A stream of this client has started; it is held at once if the client is behind."""
        self._streams.add(response_id)
        if self._held_since is not None:
            self._engine.hold(response_id)

    def remove_stream(self, response_id: str) -> None:
        """It has ended."""
        self._streams.discard(response_id)

    # --- filling ------------------------------------------------------------------------------------------

    def put(self, event: wire.ServerEvent, response_id: str | None = None) -> None:
        """Queue an event for writing; never waits."""
        self.outbox.put(event, response_id)
        self._something.set()
        self._empty.clear()
        if self._held_since is None and self.outbox.pending_bytes > self._config.pending_limit_bytes:
            self._held_since = time.monotonic()
            self._metrics.held_total += 1
            self._room.clear()
            for stream in self._streams:
                self._engine.hold(stream)

    async def room(self) -> None:
        """Wait until the client is not behind: a client that sends and does not read must not pile up our answers."""
        await self._room.wait()

    async def flushed(self) -> None:
        """Wait until everything was written."""
        await self._empty.wait()

    def finish(self) -> None:
        """Nothing more will be put: `run` returns when the rest is written."""
        self._finishing = True
        self._something.set()

    # --- writing ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write until `finish`.

        Raises:
            SlowReaderError: one write, or a hold, lasted longer than ``slow_reader_timeout_s``.
            ConnectionError: the client is gone.
        """
        timeout_s = self._config.slow_reader_timeout_s
        while True:
            event = self.outbox.pop()
            if event is None:
                self._empty.set()
                if self._finishing:
                    return
                await self._wait()
                continue
            try:
                async with asyncio.timeout(timeout_s):
                    await self._write(event)
            except TimeoutError:
                raise SlowReaderError(f"a write waited for more than {timeout_s:g} s") from None
            self._measure(event)
            if self._held_since is not None:
                if self.outbox.pending_bytes <= self._config.pending_limit_bytes // 4:
                    self._release()
                elif time.monotonic() - self._held_since > timeout_s:
                    raise SlowReaderError(f"streams were held for more than {timeout_s:g} s")

    def _measure(self, event: wire.ServerEvent) -> None:
        """Count how long the reader waited for text of a message since the last of it."""
        if isinstance(event, wire.TextDelta):
            now = time.monotonic()
            if event.item_id in self._text_at:
                self._metrics.inter_chunk_gap.observe(now - self._text_at[event.item_id])
            self._text_at[event.item_id] = now
        elif isinstance(event, wire.TextDone):
            self._text_at.pop(event.item_id, None)

    def _release(self) -> None:
        self._held_since = None
        self._room.set()
        for stream in self._streams:
            self._engine.release(stream)

    async def _wait(self) -> None:
        self._something.clear()
        if self._idle is None:
            await self._something.wait()
            return
        try:
            async with asyncio.timeout(self._config.heartbeat_s):
                await self._something.wait()
        except TimeoutError:
            await self._idle()
