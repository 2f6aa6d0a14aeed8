"""Clients that do not keep the rules: bytes over a plain connection."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from wire.harness import Running

HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"
UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n"
)


class Raw:
    """A connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: str | bytes) -> None:
        self.writer.write(data if isinstance(data, bytes) else data.encode("latin-1"))

    async def answer(self) -> Answer:
        """The next answer."""
        async with asyncio.timeout(5):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            answer = Answer(head)
            length = int(answer.headers.get("content-length", "0"))
            answer.body = await self.reader.readexactly(length)
        return answer

    async def rest(self) -> bytes:
        """Everything up to the end, which has to come."""
        async with asyncio.timeout(5):
            try:
                return await self.reader.read(-1)
            except ConnectionError:
                return b""

    async def close_code(self) -> int:
        """The code of the server's close frame; what comes before it is read."""
        async with asyncio.timeout(5):
            while True:
                first, second = await self.reader.readexactly(2)
                length = second & 0x7F
                if length == 126:
                    (length,) = struct.unpack("!H", await self.reader.readexactly(2))
                data = await self.reader.readexactly(length)
                if first & 0x0F == 8:
                    return int.from_bytes(data[:2])

    def reset(self) -> None:
        """Go without a word, as a process that is killed."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Answer:
    """The head and body of an answer."""

    def __init__(self, head: str) -> None:
        first, *lines = head.strip().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        self.body = b""
        self.head = head

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


@asynccontextmanager
async def connect(running: Running, *, receive_buffer: int | None = None) -> AsyncIterator[Raw]:
    """A connection that nothing was sent on."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", running.server.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096 if receive_buffer else 1 << 20)
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()


async def ask(running: Running, request: str | bytes) -> Answer:
    """One request on a connection of its own."""
    async with connect(running) as raw:
        raw.send(request)
        return await raw.answer()


def post(body: bytes = b'{"input":"x"}', headers: str = "", path: str = "/v1/responses") -> bytes:
    """A whole request."""
    return f"POST {path} HTTP/1.1\r\n{HEAD}{headers}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


def frame(opcode: int, payload: bytes, *, masked: bool = True) -> bytes:
    """A client's frame of up to 125 bytes, with a mask of zeros."""
    head = struct.pack("!BB", 0x80 | opcode, (0x80 if masked else 0) | len(payload))
    return head + (b"\0\0\0\0" if masked else b"") + payload
