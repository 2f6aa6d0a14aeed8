"""A real server on a free loopback port, a fake engine behind it, and clients in front."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvloop

from dspark_stream.server.app import Server
from dspark_stream.server.settings import ServerConfig
from fakes import FakeEngine, FakeTokenizer, Script
from wire.harness import Launch, Running


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    """The loop that the service runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def launch() -> AsyncIterator[Launch]:
    """Start a server with ``ServerConfig`` changes; stopped after the test."""
    started: list[Running] = []

    async def start(engine: FakeEngine | Script | None = None, **changes: Any) -> Running:
        if not isinstance(engine, FakeEngine):
            engine = FakeEngine(engine)
        tokenizer = FakeTokenizer()
        values = {"port": 0, "shutdown_timeout_s": 0.0, "close_timeout_s": 0.5, **changes}
        server = Server(ServerConfig(**values), engine, tokenizer)
        await server.start()
        started.append(Running(server, engine, tokenizer))
        return started[-1]

    yield start
    for running in started:
        running.tokenizer.gate.set()
        await running.server.stop()
        # Whatever a test did to it: no stream, no place, no memory and no receiver may be left.
        assert running.server.service.admission.in_flight == 0
        assert running.server.service.admission.bytes_held == 0
        assert len(running.server.service.hub) == 0
        assert set(running.engine.finished) == {request.request_id for request in running.engine.submitted}


@pytest.fixture
async def running(launch: Launch) -> Running:
    """A server with the defaults."""
    return await launch()
