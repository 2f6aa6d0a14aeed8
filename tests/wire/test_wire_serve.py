"""The process: it says when it is ready, takes signals, and leaves cleanly."""

from __future__ import annotations

import asyncio
import os
import signal
import socket as sockets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import websockets

from dspark_stream.server.app import serve
from dspark_stream.server.settings import ServerConfig
from fakes import FakeEngine, FakeTokenizer
from wire.harness import Socket

SCRIPT = Path(__file__).with_name("fake_server.py")


@asynccontextmanager
async def process(shutdown_timeout_s: float, port: int = 0) -> AsyncIterator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SCRIPT),
        str(port),
        str(shutdown_timeout_s),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


async def address(server: asyncio.subprocess.Process) -> str:
    assert server.stdout is not None
    line = await asyncio.wait_for(server.stdout.readline(), 20)
    return line.decode().strip().replace("http://", "ws://") + "v1/responses"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_drains_and_a_second_one_does_not_wait(number: signal.Signals) -> None:
    """Guards against a process that ignores a signal while it answers, or that cannot be hurried."""
    async with process(60.0) as server:
        async with websockets.connect(await address(server)) as connection:
            socket = Socket(connection)
            await socket.create()
            await socket.until("response.output_text.delta")
            server.send_signal(number)
            await asyncio.sleep(0.2)
            assert server.returncode is None
            await socket.until("response.output_text.delta")
            begun = time.monotonic()
            server.send_signal(number)
            events = await socket.until("response.failed")
            assert events[-1]["response"]["error"]["code"] == "server_shutdown"
            assert await socket.closed() == 1012
        assert await asyncio.wait_for(server.wait(), 10) == 0
        assert time.monotonic() - begun < 5
        assert server.stderr is not None
        assert b"Traceback" not in await server.stderr.read()


async def test_a_process_whose_engine_has_failed_says_so_and_ends() -> None:
    """Guards against a service that nobody restarts although it can do nothing any more."""
    async with process(60.0) as server:
        where = await address(server)
        async with websockets.connect(where) as connection:
            socket = Socket(connection)
            await socket.create()
            await socket.until("response.output_text.delta")
            server.send_signal(signal.SIGUSR1)
            events = await socket.until("response.failed")
            assert events[-1]["response"]["error"]["code"] == "engine_failed"
            async with aiohttp.ClientSession() as http, http.get(health(where)) as answer:
                assert (answer.status, (await answer.json())["reason"]) == (503, "a test broke it")
            assert await socket.closed() == 1012
        assert await asyncio.wait_for(server.wait(), 10) == 1
        assert server.stderr is not None
        said = await server.stderr.read()
        assert b"a test broke it" in said
        assert b"Traceback" not in said


async def test_an_engine_that_fails_while_it_drains_is_a_failure() -> None:
    """Guards against a supervisor that takes a broken service for one that ended as told."""
    async with process(60.0) as server:
        async with websockets.connect(await address(server)) as connection:
            socket = Socket(connection)
            await socket.create()
            await socket.until("response.output_text.delta")
            server.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            server.send_signal(signal.SIGUSR1)
            await socket.until("response.failed")
        assert await asyncio.wait_for(server.wait(), 10) == 1


async def test_signals_after_the_second_change_nothing() -> None:
    """Guards against closings that nobody waits for."""
    engine, up = FakeEngine(), asyncio.Event()
    closings: list[float] = []
    close = engine.close

    def counted(timeout_s: float) -> None:
        closings.append(timeout_s)
        close(timeout_s)

    engine.close = counted  # type: ignore[method-assign]
    serving = asyncio.create_task(
        serve(ServerConfig(port=0), engine, FakeTokenizer(), ready=lambda _: up.set()),
    )
    await asyncio.wait_for(up.wait(), 5)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        await asyncio.sleep(0)
    await asyncio.wait_for(serving, 5)
    assert sorted(closings) == [0.0, 30.0]


def health(where: str) -> str:
    return where.replace("ws://", "http://").replace("v1/responses", "health")


async def test_a_taken_port_is_a_plain_error() -> None:
    """Guards against a stack trace where a sentence is enough."""
    with sockets.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with process(0.0, taken.getsockname()[1]) as server:
            assert await asyncio.wait_for(server.wait(), 20) == 1
            assert server.stderr is not None
            said = (await server.stderr.read()).decode()
    assert said.startswith("port: cannot listen on 127.0.0.1:")
    assert "Traceback" not in said
