"""A client of the WebSocket ``/v1/responses``: several responses at once over one socket, each in a lane.

::

    async with await DsparkClient.connect("ws://127.0.0.1:8000") as client:
        stream = await client.create({"input": "Why is the sky blue?"})
        async for event in stream:
            if event["type"] == "response.output_text.delta":
                print(event["delta"], end="")

Events are the server's, as dicts. Imports nothing of the project but its errors.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol

from dspark_stream.errors import DsparkError

Event = dict[str, Any]
Encoding = Literal["json", "msgpack"]

PATH = "/v1/responses"
TERMINAL_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed", "response.cancelled"})
_MAX_MESSAGE_BYTES = 64 << 20


class ClientError(DsparkError):
    """Something between this client and the service went wrong."""

    code = "client_error"


class UnreachableError(ClientError):
    """No service answers there, or it does not let us in."""


class ConnectionLostError(ClientError):
    """The socket closed while a response was under way."""


class RefusedError(ClientError):
    """The service refused a request; ``status``, ``code`` and ``param`` are the service's own."""

    def __init__(self, event: Event) -> None:
        error = event.get("error") or {}
        super().__init__(str(error.get("message", "refused")), param=error.get("param"), code=error.get("code"))
        self.status = int(event.get("status", 500))
        self.type = str(error.get("type", ""))
        self.retry_after_s: int | None = event.get("retry_after_s")


class ResponseStream:
    """The events of one response, up to and with its terminal one. Iterate it once."""

    def __init__(self, client: DsparkClient, lane: str, event_id: str) -> None:
        self._client = client
        self._events: asyncio.Queue[Event | ClientError] = asyncio.Queue()
        self.lane = lane
        self.event_id = event_id
        self.response_id: str | None = None
        """Known from ``response.created`` on."""

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield events.

        Raises:
            RefusedError: the service refused the request.
            ConnectionLostError: the socket closed before the terminal event.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, ClientError):
                raise event
            yield event
            if event["type"] in TERMINAL_EVENTS:
                return

    async def cancel(self) -> None:
        """Ask for the end; the terminal event is the answer. Without an id yet, its lane is ended."""
        if self.response_id is not None:
            await self._client.cancel(response_id=self.response_id)
        else:
            await self._client.cancel(lane=self.lane)

    def _put(self, event: Event | ClientError) -> None:
        self._events.put_nowait(event)


class DsparkClient:
    """One socket. Made by `connect`; use it as an async context manager, or call `close`."""

    def __init__(self, socket: ClientConnection, encoding: Encoding, hello: Event) -> None:
        self.hello = hello
        """The service's ``dspark:hello``: version, model, drafter, limits."""
        self._socket = socket
        self._encoding = encoding
        self._numbers = itertools.count(1)
        # Within a lane answers come first in, first out: events belong to the lane's first stream.
        self._lanes: dict[str, deque[ResponseStream]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        api_key: str = "",
        encoding: Encoding = "json",
        timeout_s: float = 10.0,
        tls: ssl.SSLContext | None = None,
    ) -> DsparkClient:
        """Open a socket and wait for the greeting. ``http(s)`` URLs and URLs without a path will do.

        Raises:
            UnreachableError: nobody answers, not this service, a key is missing or wrong.
        """
        address = _socket_url(url)
        try:
            socket = await connect(
                address,
                additional_headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
                subprotocols=[Subprotocol(f"dspark.v1+{encoding}")],
                open_timeout=timeout_s,
                max_size=_MAX_MESSAGE_BYTES,
                ssl=tls,
                proxy=None if urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1") else True,
            )
        except InvalidStatus as error:
            raise UnreachableError(_why_refused(address, error)) from None
        except InvalidURI:
            raise UnreachableError(f"{url!r} is not an address like ws://127.0.0.1:8000") from None
        except (OSError, TimeoutError, InvalidHandshake) as error:
            raise UnreachableError(f"no service answers at {address} ({_brief(error)})") from None
        try:
            async with asyncio.timeout(timeout_s):
                hello = _decode(await socket.recv(), encoding)
        except (ConnectionClosed, TimeoutError) as error:
            await socket.close()
            raise UnreachableError(f"{address} did not greet us ({_brief(error)})") from None
        if hello.get("type") != "dspark:hello":
            await socket.close()
            raise UnreachableError(f"what answers at {address} is no dspark-stream service")
        return cls(socket, encoding, hello)

    async def __aenter__(self) -> DsparkClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def create(self, body: Event, *, lane: str | None = None) -> ResponseStream:
        """Send ``response.create`` with ``body``. Without a ``lane`` the response gets one of its own.

        Raises:
            ConnectionLostError: the socket is closed.
        """
        number = next(self._numbers)
        stream = ResponseStream(self, lane or f"lane-{number}", f"event-{number}")
        self._lanes.setdefault(stream.lane, deque()).append(stream)
        try:
            await self._send({"type": "response.create", "event_id": stream.event_id, "stream_id": stream.lane, **body})
        except ConnectionLostError:
            self._forget(stream)
            raise
        return stream

    async def cancel(self, *, response_id: str | None = None, lane: str | None = None) -> None:
        """Send ``response.cancel`` for one response, or for all that are in a lane."""
        target = {"response_id": response_id} if response_id is not None else {"stream_id": lane}
        await self._send({"type": "response.cancel", **target})

    async def close(self) -> None:
        """Close the socket; open streams end in `ConnectionLostError`."""
        await self._socket.close()
        with suppress(asyncio.CancelledError):
            await self._reader

    # --- inside ---------------------------------------------------------------------------------------------

    async def _send(self, event: Event) -> None:
        frame: str | bytes = msgspec.json.encode(event).decode()
        if self._encoding == "msgpack":
            frame = msgspec.msgpack.encode(event)
        try:
            await self._socket.send(frame)
        except ConnectionClosed as error:
            raise ConnectionLostError(f"the service has closed the socket ({_brief(error)})") from None

    async def _read(self) -> None:
        why = "closed"
        try:
            while True:
                self._route(_decode(await self._socket.recv(), self._encoding))
        except ConnectionClosed as error:
            why = _brief(error)
        except msgspec.DecodeError as error:
            why = f"what it sent cannot be read: {error}"
            await self._socket.close()
        finally:
            lost = ConnectionLostError(f"the connection to the service was lost ({why})")
            for stream in [stream for lane in self._lanes.values() for stream in lane]:
                stream._put(lost)
            self._lanes.clear()

    def _route(self, event: Event) -> None:
        if event["type"] == "error":
            self._refuse(event)
            return
        lane = self._lanes.get(event.get("stream_id", ""))
        if not lane:
            return  # of a response that was refused or given up
        stream = lane[0]
        if event["type"] == "response.created":
            stream.response_id = event["response"]["id"]
        stream._put(event)
        if event["type"] in TERMINAL_EVENTS:
            self._forget(stream)

    def _refuse(self, event: Event) -> None:
        for stream in self._lanes.get(event.get("stream_id", ""), ()):
            if stream.event_id == event.get("event_id"):
                stream._put(RefusedError(event))
                self._forget(stream)
                return

    def _forget(self, stream: ResponseStream) -> None:
        lane = self._lanes.get(stream.lane)
        if lane is not None and stream in lane:
            lane.remove(stream)
            if not lane:
                del self._lanes[stream.lane]


def _socket_url(url: str) -> str:
    if "://" not in url:
        url = f"ws://{url}"
    url = url.replace("http://", "ws://", 1).replace("https://", "wss://", 1)
    return url if urlsplit(url).path not in ("", "/") else url.rstrip("/") + PATH


def _decode(frame: str | bytes, encoding: Encoding) -> Event:
    if encoding == "msgpack" and isinstance(frame, bytes):
        return msgspec.msgpack.decode(frame, type=Event)
    return msgspec.json.decode(frame, type=Event)


def _brief(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def _why_refused(address: str, error: InvalidStatus) -> str:
    status = error.response.status_code
    reasons = {
        401: "it asks for a key: give the right one with --api-key or DSPARK_API_KEY",
        403: "it does not accept this host name or origin; see its --allowed-host",
        404: "there is no such path",
        503: "it is busy or shutting down; try again in a moment",
    }
    return f"{address} refused the connection: {reasons.get(status, f'HTTP status {status}')}"
