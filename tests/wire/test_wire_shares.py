"""Two clients: what one does with all it may have, the other must not feel."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from fakes import FakeEngine, FakeTokenizer, Script, model_info
from wire.harness import Launch, Running, Socket, eventually
from wire.raw import HEAD, connect

LONG = Script(tokens=["word "] * 1000, rounds=(1,))


def client(running: Running, address: str) -> aiohttp.ClientSession:
    """One with an address of its own; all of 127.0.0.0/8 is this machine's."""
    connector = aiohttp.TCPConnector(local_addr=(address, 0), limit=0)
    return aiohttp.ClientSession(running.url, connector=connector)


async def ask(http: aiohttp.ClientSession, text: str, **fields: Any) -> tuple[int, Any]:
    async with http.post("/v1/responses", json={"input": text, **fields}) as answer:
        return answer.status, await answer.json()


async def test_a_greedy_client_leaves_places_for_another(launch: Launch) -> None:
    """Guards against a second client that is told that the server is full, while one client has all of it."""
    engine = FakeEngine(LONG, info=model_info(max_num_seqs=4))
    running = await launch(engine, max_queue=8)
    engine.gate.clear()
    async with client(running, "127.0.0.1") as hog, client(running, "127.0.0.2") as polite:
        greedy = [asyncio.create_task(ask(hog, "hog")) for _ in range(20)]
        await eventually(lambda: engine.live == 6 and running.server.service.metrics.refused.total() == 14)
        second = asyncio.create_task(ask(polite, "polite", max_output_tokens=1))
        await eventually(lambda: engine.live == 7)
        names = [request.client for request in engine.submitted]
        assert len(set(names[:6])) == 1
        assert names[6] not in names[:6]
        assert not any("127" in name for name in names)
        for task in greedy:
            if task.done():
                status, body = task.result()
                assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
                assert "6 of the server's 12 places" in body["error"]["message"]
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
        await eventually(lambda: engine.live == 1)
        engine.gate.set()
        assert (await second)[0] == 200


async def test_prompts_that_wait_take_only_so_much_memory(launch: Launch) -> None:
    """Guards against thousands of long prompts that fit the queue and not the machine; another client has room left."""
    engine = FakeEngine(LONG, info=model_info(max_num_seqs=4))
    running = await launch(engine, queue_memory=2 << 20)
    admission = running.server.service.admission
    engine.gate.clear()
    async with client(running, "127.0.0.1") as hog, client(running, "127.0.0.2") as polite:
        greedy = [asyncio.create_task(ask(hog, "hog " * 300)) for _ in range(40)]
        await eventually(lambda: engine.live + running.server.service.metrics.refused.total() == 40)
        there = engine.live
        assert 5 < there < 22  # of a megabyte, with more than 48 kB each
        assert admission.bytes_held <= 1 << 20
        second = asyncio.create_task(ask(polite, "polite", max_output_tokens=1))
        await eventually(lambda: engine.live == there + 1)
        for task in greedy:
            if task.done():
                status, body = task.result()
                assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
                assert "of the server's 2 MiB" in body["error"]["message"]
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
        engine.gate.set()
        assert (await second)[0] == 200
    assert admission.bytes_held == 0


async def test_bodies_on_their_way_take_only_so_much_memory(launch: Launch) -> None:
    """Guards against strangers who fill the memory with bodies whose ends never come."""
    running = await launch(queue_memory=2 << 20)
    admission = running.server.service.admission
    async with AsyncExitStack() as stack:
        begun = [await stack.enter_async_context(connect(running)) for _ in range(5)]
        for i, raw in enumerate(begun, 1):
            raw.send(f"POST /v1/responses HTTP/1.1\r\n{HEAD}Content-Length: 400000\r\n\r\n")
            raw.send(b" " * 300_000)
            least = 300_000 * min(i, 3)
            await eventually(lambda least=least: admission.bytes_held >= least)  # type: ignore[misc]
        for raw in begun[3:]:
            answer = await raw.answer()
            assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
            assert "retry-after" in answer.headers
        begun[0].send(b'{"input":"x"}'.ljust(100_000))
        assert (await begun[0].answer()).status == 200
    await eventually(lambda: admission.bytes_held == 0)


async def test_what_waits_in_a_lane_takes_only_so_much_memory(launch: Launch) -> None:
    """Guards against sockets full of long texts that wait behind one response, which nothing counted."""
    engine = FakeEngine(LONG, info=model_info(max_num_seqs=4, max_model_len=400_000))
    running = await launch(engine, queue_memory=2 << 20)
    admission = running.server.service.admission
    engine.gate.clear()

    async def fill(socket: Socket) -> None:
        await socket.create(stream_id="a")
        await socket.until("response.in_progress")
        for number in range(4):
            await socket.create(input="x" * 280_000, stream_id="a", event_id=str(number))
        error = (await socket.until("error"))[-1]
        assert (error["status"], error["error"]["code"], error["event_id"]) == (429, "rate_limit_exceeded", "3")
        assert 900_000 < admission.bytes_held <= 1 << 20

    async with running.socket() as socket:
        await fill(socket)
        await socket.send({"type": "response.cancel", "stream_id": "a"})
        for _ in range(4):
            await socket.until("response.cancelled")
        await eventually(lambda: admission.bytes_held == 0)
        await fill(socket)
    await eventually(lambda: admission.bytes_held == 0)


async def test_an_ipv6_network_is_one_client(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a host that has 2^64 addresses and as many shares; the log says which one it was all the same."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(web.BaseRequest, "remote", property(lambda request: request.headers["From"]))
    engine = FakeEngine(LONG)
    running = await launch(engine, max_streams_per_client=1)
    engine.gate.clear()
    async with running.http() as http:

        async def ask_from(address: str) -> int:
            body = {"input": "x", "max_output_tokens": 1}
            async with asyncio.timeout(5), http.post("/v1/responses", json=body, headers={"From": address}) as answer:
                return answer.status

        first = asyncio.create_task(ask_from("2001:db8:1:2::3"))
        await eventually(lambda: engine.live == 1)
        assert await ask_from("2001:db8:1:2:ffff::4") == 429
        other = asyncio.create_task(ask_from("2001:db8:1:3::3"))
        await eventually(lambda: engine.live == 2)
        engine.gate.set()
        assert (await first, await other) == (200, 200)
    told = {getattr(record, "fields", {}).get("client") for record in caplog.records} - {None}
    assert told == {"2001:db8:1:2::3", "2001:db8:1:2:ffff::4", "2001:db8:1:3::3"}


async def test_long_prompts_of_one_client_do_not_hold_up_anothers(launch: Launch) -> None:
    """Guards against one line for the tokenizer in which everybody stands behind a client's hundred long prompts."""
    running = await launch(FakeEngine(Script(tokens=["a"], rounds=(1,))), tokenizer_threads=2)
    gate = threading.Event()
    real: Any = FakeTokenizer.encode_chat
    began = []

    def encode_chat(messages: Any, most: int | None = None) -> list[int]:
        if messages[0][1] == "hog":
            began.append(1)
            gate.wait(10)
        return real(running.tokenizer, messages, most)  # type: ignore[no-any-return]

    running.tokenizer.encode_chat = encode_chat  # type: ignore[method-assign]
    async with client(running, "127.0.0.1") as hog, client(running, "127.0.0.2") as polite:
        greedy = [asyncio.create_task(ask(hog, "hog")) for _ in range(20)]
        await eventually(lambda: running.server.service.admission.in_flight == 20)
        for _ in range(3):
            assert (await ask(polite, "hello"))[0] == 200
        assert len(began) == 1
        gate.set()
        assert {status for status, _ in await asyncio.gather(*greedy)} == {200}


async def test_long_prompts_of_many_clients_hold_up_no_short_one(launch: Launch) -> None:
    """Guards against a few addresses, with a megabyte of underscores each, that take every thread of the tokenizer."""
    info = model_info(max_model_len=60_000)
    running = await launch(FakeEngine(Script(tokens=["a"], rounds=(1,)), info=info), tokenizer_threads=2)
    gate = threading.Event()
    real: Any = FakeTokenizer.encode_chat

    def encode_chat(messages: Any, most: int | None = None) -> list[int]:
        if len(messages[0][1]) > 10_000:
            gate.wait(10)
        return real(running.tokenizer, messages, most)  # type: ignore[no-any-return]

    running.tokenizer.encode_chat = encode_chat  # type: ignore[method-assign]
    async with AsyncExitStack() as stack:
        hogs = [await stack.enter_async_context(client(running, f"127.0.0.{i}")) for i in range(3, 9)]
        polite = await stack.enter_async_context(client(running, "127.0.0.2"))
        greedy = [asyncio.create_task(ask(hog, "_" * 40_000, max_output_tokens=1)) for hog in hogs]
        await eventually(lambda: running.server.service.admission.in_flight == 6)
        for _ in range(3):
            assert (await ask(polite, "hello"))[0] == 200
        gate.set()
        assert {status for status, _ in await asyncio.gather(*greedy)} == {200}


async def test_a_crowd_of_messages_is_refused_at_once(launch: Launch) -> None:
    """Guards against a body whose every message costs the loop time, whatever is in it."""
    running = await launch()
    crowd = [{"role": "user", "content": "a"}] * 2049
    async with running.http() as http:
        for path, name in (("/v1/responses", "input"), ("/v1/chat/completions", "messages")):
            async with http.post(path, json={name: crowd}) as answer:
                error = (await answer.json())["error"]
                assert (answer.status, error["param"]) == (400, name)
                assert "at most 2048" in error["message"]
    assert not running.tokenizer.chats
