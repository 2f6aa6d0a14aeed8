"""Clients that vanish, clients that do not read, and a server that shuts down."""

from __future__ import annotations

import asyncio
import json
import socket as sockets
import time
from typing import Any

import pytest

from fakes import FakeEngine, Script, model_info
from wire.harness import TERMINAL, Launch, Running, Socket, check_response, eventually, text_of

LONG = Script(tokens=["word "] * 1000, rounds=(1,))


# --- vanishing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_vanishing_while_decoding_frees_the_stream(launch: Launch, how: str) -> None:
    """Guards against streams that go on for nobody."""
    running = await launch(FakeEngine(LONG))
    async with running.socket() as socket:
        await socket.create()
        await socket.create(stream_id="b")
        await socket.until("response.output_text.delta")
        if how == "reset":
            socket.connection.transport.abort()
        else:
            await socket.connection.close()
        await eventually(lambda: running.engine.live == 0 and running.server.service.admission.in_flight == 0)
    assert set(running.engine.finished.values()) == {"cancelled"}


async def test_vanishing_during_prefill(launch: Launch) -> None:
    """Guards against a prompt that is read to the end although nobody waits for the answer."""
    running = await launch(FakeEngine(Script(prefill_steps=10**9)))
    async with running.socket() as socket:
        await socket.create()
        await socket.until("response.in_progress")
        socket.connection.transport.abort()
        await eventually(lambda: running.engine.live == 0)


async def test_vanishing_while_waiting_for_the_engine(launch: Launch) -> None:
    """Guards against a queue that fills with requests of clients that have gone."""
    running = await launch(FakeEngine(LONG, info=model_info(max_num_seqs=1)))
    async with running.socket() as stays, running.socket() as goes:
        await stays.create()
        await stays.until("response.output_text.delta")
        await goes.create()
        await goes.until("response.in_progress")
        goes.connection.transport.abort()
        waiting = running.engine.submitted[1].request_id
        await eventually(lambda: waiting in running.engine.cancels)
        await eventually(lambda: running.server.service.admission.in_flight == 1)
        assert (await stays.receive())["type"] == "response.output_text.delta"


async def test_vanishing_while_tokenising_never_reaches_the_engine(running: Running) -> None:
    """Guards against a prompt that is submitted after its client has gone, and a place that it keeps."""
    running.tokenizer.gate.clear()
    async with running.socket() as socket:
        await socket.create()
        await eventually(lambda: len(running.tokenizer.chats) == 1)
        assert running.server.service.admission.in_flight == 1
        socket.connection.transport.abort()
        await eventually(lambda: running.server.service.admission.in_flight == 0)
    running.tokenizer.gate.set()
    await asyncio.sleep(0.05)
    assert not running.engine.submitted


async def test_vanishing_http_clients(launch: Launch) -> None:
    """Guards against streams that outlive an HTTP request, streamed or not, read or not."""
    running = await launch(FakeEngine(LONG, step_s=0.005))
    async with running.http() as http:
        for path, body in (
            ("/v1/responses", {"input": "x", "stream": True}),
            ("/v1/responses", {"input": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
        ):
            before = len(running.engine.submitted)
            request = asyncio.create_task(_read(http, path, body))
            await eventually(lambda before=before: len(running.engine.submitted) > before)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            await eventually(lambda: running.engine.live == 0)
    assert set(running.engine.finished.values()) == {"cancelled"}


async def _read(http: Any, path: str, body: dict[str, Any]) -> bytes:
    async with http.post(path, json=body) as answer:
        data: bytes = await answer.read()
        return data


# --- slow readers ---------------------------------------------------------------------------------------------------


def small_window(port: int) -> sockets.socket:
    """A connection whose kernel takes little on behalf of a reader that does not read."""
    sock = sockets.socket()
    sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.setblocking(False)
    return sock


SLOW: dict[str, Any] = {"write_buffer_bytes": 4096, "send_buffer_bytes": 8192, "pending_limit_bytes": 16_384}


async def test_a_slow_reader_is_merged_then_held_and_loses_nothing(launch: Launch) -> None:
    """Guards against a reader that stops reading and slows the others, fills the memory, or loses text."""
    count = 3000
    slow_words, fast_words = [f"slow{i:04d}-{'x' * 30} " for i in range(count)], ["f "] * 300

    def script(request: Any) -> Script:
        slow = b"slow" in bytes(request.prompt_ids)
        return Script(tokens=slow_words if slow else fast_words, rounds=(1,))

    engine = FakeEngine(script, step_s=0.0003, info=model_info(max_model_len=8192))
    running = await launch(engine, default_max_output_tokens=count, **SLOW)
    sock = small_window(running.server.port)
    async with running.socket(sock=sock, max_queue=1) as slow, running.socket() as fast:
        await slow.create(input="slow")
        await eventually(lambda: bool(engine.holds))
        stalled = engine.rounds_total
        begun = time.monotonic()
        await fast.create(input="fast")
        events = await fast.response()
        assert text_of(events) == "f " * 300
        assert time.monotonic() - begun < 2.0
        assert sum(event["type"] == "response.output_text.delta" for event in events) > 250
        # While it was held it did not run: only the other one's rounds were made.
        assert engine.rounds_total - stalled < 320
        (shell,) = [s for s in running.server.sockets.open if s.pending_bytes]
        assert shell.pending_bytes < SLOW["pending_limit_bytes"] + 8192
        events = await slow.response()
    assert text_of(events) == "".join(slow_words)
    assert engine.releases
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert len(deltas) < count
    assert running.server.service.metrics.held_total >= 1


async def test_a_reader_that_is_too_slow_is_closed(launch: Launch) -> None:
    """Guards against streams that are held for ever for a client that never reads again."""
    script = Script(tokens=["x" * 200] * 2000, rounds=(1,))
    running = await launch(FakeEngine(script, step_s=0.0001), slow_reader_timeout_s=0.3, **SLOW)
    sock = small_window(running.server.port)
    async with running.socket(sock=sock, max_queue=1, close_timeout=0.2) as socket:
        metrics = running.server.service.metrics
        (shell,) = running.server.sockets.open
        await socket.create()
        await eventually(lambda: running.engine.live == 1)
        await eventually(lambda: running.engine.live == 0, timeout_s=5)
        await eventually(lambda: metrics.sockets_open == 0)
        assert metrics.sockets_closed == {1013: 1}
        await eventually(lambda: shell not in running.server.sockets.open)


async def test_a_slow_reader_of_an_event_stream(launch: Launch) -> None:
    """Guards against the same over HTTP: nothing lost if it reads again."""
    words = [f"{i:04d}-{'x' * 40} " for i in range(2000)]
    engine = FakeEngine(Script(tokens=words, rounds=(1,)), step_s=0.0001, info=model_info(max_model_len=8192))
    running = await launch(engine, default_max_output_tokens=2000, **SLOW)
    sock = small_window(running.server.port)
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    body = b'{"input":"x","stream":true}'
    writer.write(
        b"POST /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    await eventually(lambda: bool(engine.holds))
    data = await reader.read(-1)
    writer.close()
    assert engine.releases
    for word in (words[0], words[999], words[-1]):
        assert word.encode() in data
    assert data.count(b"event: response.completed") == 1


# --- shutting down --------------------------------------------------------------------------------------------------


async def test_draining_lets_streams_finish_and_refuses_new_ones(launch: Launch) -> None:
    """Guards against answers cut by a restart, work taken during one, and sockets that just disappear."""
    script = Script(tokens=["x "] * 60, rounds=(1,))
    running = await launch(FakeEngine(script, step_s=0.01), shutdown_timeout_s=10.0)
    async with running.socket() as socket, running.http() as http:
        await socket.create(stream_id="a")
        await socket.create(stream_id="a")  # waits in its lane, and will have to be refused
        await socket.until("response.output_text.delta")
        stopping = asyncio.create_task(running.server.stop())
        await asyncio.sleep(0.05)
        async with http.get("/ready") as answer:
            assert (answer.status, await answer.json()) == (503, {"status": "draining"})
        async with http.get("/health") as answer:
            assert answer.status == 200
        async with http.post("/v1/responses", json={"input": "x"}) as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert (await answer.json())["error"]["code"] == "draining"
        async with http.get("/v1/responses", headers={"Upgrade": "websocket", "Connection": "Upgrade"}) as answer:
            assert answer.status == 503
        await socket.create(stream_id="b", event_id="late")
        events = await socket.until("error")
        assert (events[-1]["status"], events[-1]["event_id"]) == (503, "late")
        assert not stopping.done()
        events = await socket.until("response.completed")
        assert (await socket.receive())["error"]["code"] == "draining"
        assert await socket.closed() == 1012
        await stopping
    assert list(running.engine.finished.values()) == ["stop"]


async def test_draining_ends_what_does_not_finish_in_time(launch: Launch) -> None:
    """Guards against a shutdown that never ends, and against streams that it cuts without an end of their own."""
    running = await launch(FakeEngine(LONG, step_s=0.01), shutdown_timeout_s=0.1)
    async with running.socket() as socket:
        await socket.create()
        begun = time.monotonic()
        events = await socket.until("response.output_text.delta")
        await asyncio.gather(running.server.stop(), _to_the_end(socket, events))
        check_response(events)
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"]["code"] == "server_shutdown"
        assert socket.connection.close_code == 1012
        assert time.monotonic() - begun < 5


async def test_what_a_shutdown_cuts_says_so_in_every_api(launch: Launch) -> None:
    """Guards against half an answer that looks whole: finish_reason stop, status completed, or 200."""
    running = await launch(FakeEngine(LONG, step_s=0.005), shutdown_timeout_s=0.05)
    chat = {"messages": [{"role": "user", "content": "x"}]}
    calls = (
        ("/v1/responses", {"input": "x"}),
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"input": "x", "stream": True}),
        ("/v1/chat/completions", {**chat, "stream": True}),
        ("/v1/chat/completions", {**chat, "stream": True, "stream_options": {"include_usage": True}}),
    )
    async with running.http() as http:
        reads = [asyncio.create_task(_answer(http, path, body)) for path, body in calls]
        await eventually(lambda: running.engine.rounds_total > 20)
        await running.server.stop()
        whole, *streams = zip(calls, await asyncio.gather(*reads), strict=True)
        for _, (status, data) in (whole, streams.pop(0)):
            assert status == 503
            assert json.loads(data)["error"]["code"] == "server_shutdown"
        for (path, _), (status, data) in streams:
            assert status == 200
            assert data.count(b'"code":"server_shutdown"') == 1
            assert b'"stop"' not in data
            assert b'"completed"' not in data
            assert data.count(b"[DONE]" if "chat" in path else b"event: response.failed") == 1


async def _answer(http: Any, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    async with http.post(path, json=body) as answer:
        return answer.status, await answer.read()


async def _to_the_end(socket: Socket, events: list[Any]) -> None:
    events += await socket.until(*TERMINAL)
    await socket.closed()


async def test_draining_does_not_wait_for_a_reader_that_does_not_read(launch: Launch) -> None:
    """Guards against one stuck client that keeps a whole server from restarting."""
    running = await launch(FakeEngine(LONG), **SLOW)
    sock = small_window(running.server.port)
    async with running.socket(sock=sock, max_queue=1, close_timeout=0.2) as socket:
        await socket.create()
        await eventually(lambda: running.engine.live == 1)
        begun = time.monotonic()
        await running.server.stop()
        assert time.monotonic() - begun < 5
        assert not running.server.sockets.open
