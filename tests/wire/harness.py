"""A running server, clients for it, and the rules that every response must keep."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import websockets
from websockets.asyncio.client import ClientConnection

from dspark_stream.server.app import Server
from fakes import FakeEngine, FakeTokenizer

TERMINAL = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
Event = dict[str, Any]


@dataclass
class Running:
    """A server, what is behind it, and ways in."""

    server: Server
    engine: FakeEngine
    tokenizer: FakeTokenizer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.server.port}/v1/responses"

    @asynccontextmanager
    async def socket(self, **options: Any) -> AsyncIterator[Socket]:
        """A socket whose ``dspark:hello`` was read."""
        options.setdefault("compression", None)
        options.setdefault("max_size", None)
        async with websockets.connect(self.ws_url, **options) as connection:
            socket = Socket(connection)
            socket.hello = await socket.receive()
            yield socket

    @asynccontextmanager
    async def http(self, **options: Any) -> AsyncIterator[aiohttp.ClientSession]:
        async with aiohttp.ClientSession(self.url, **options) as session:
            yield session


class Socket:
    """A client that reads events."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.hello: Event = {}

    async def send(self, event: Event) -> None:
        if self.connection.subprotocol == "dspark.v1+msgpack":
            await self.connection.send(msgspec.msgpack.encode(event))
        else:
            await self.connection.send(json.dumps(event))

    async def create(self, **fields: Any) -> None:
        await self.send({"type": "response.create", "input": "hello", **fields})

    async def receive(self, timeout_s: float = 5.0) -> Event:
        async with asyncio.timeout(timeout_s):
            data = await self.connection.recv()
        event: Event = json.loads(data) if isinstance(data, str) else msgspec.msgpack.decode(data)
        return event

    async def until(self, *types: str) -> list[Event]:
        """Events up to the first of one of these types."""
        events = [await self.receive()]
        while events[-1]["type"] not in types:
            events.append(await self.receive())
        return events

    async def response(self) -> list[Event]:
        """The events of one response, checked against the rules that hold for each."""
        events = await self.until(*TERMINAL, "error")
        check_response(events)
        return events

    async def closed(self) -> int | None:
        """The close code, once the server has closed; what comes before is read."""
        async with asyncio.timeout(10):
            try:
                while True:
                    await self.connection.recv()
            except websockets.ConnectionClosed:
                return self.connection.close_code


def check_response(events: list[Event]) -> None:
    """Numbers without gaps, one terminal event and nothing after it, text that adds up."""
    numbered = [event for event in events if not event["type"].startswith("dspark:")]
    assert [event["sequence_number"] for event in numbered] == list(range(len(numbered)))
    assert [event["type"] in TERMINAL for event in numbered] == [False] * (len(numbered) - 1) + [True]
    done = [event["text"] for event in events if event["type"] == "response.output_text.done"]
    if done:
        assert done == [text_of(events)]


def text_of(events: list[Event]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until something that another task or thread does has happened."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


Launch = Callable[..., Awaitable[Running]]
