"""An engine that has failed for good: who hears of it, and how."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dspark_stream.server import http as http_api
from dspark_stream.server import vitals, wire
from dspark_stream.server.lifecycle import ResponseMachine, Say
from fakes import FakeEngine, Script
from wire.harness import Launch, Running, check_response, eventually
from wire.raw import connect, post

LONG = Script(tokens=["word "] * 1000, rounds=(1,))


async def probes(running: Running) -> dict[str, tuple[int, Any]]:
    async with running.http() as http:
        found = {}
        for path in ("/health", "/ready"):
            async with http.get(path) as answer:
                found[path] = (answer.status, await answer.json())
        return found


@pytest.mark.parametrize("silently", [False, True])
async def test_a_dead_engine_ends_streams_fails_probes_and_refuses(launch: Launch, silently: bool) -> None:
    """Guards against clients that wait for an engine that has gone, and probes that call it well; also where it could
    not say a word."""
    running = await launch(FakeEngine(LONG, step_s=0.01))
    assert (await probes(running))["/health"] == (200, {"status": "ok"})
    async with running.socket() as socket, running.http() as http:
        reads = [
            asyncio.create_task(_post(http, path, body))
            for path, body in (
                ("/v1/responses", {"input": "x"}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            )
        ]
        await socket.create()
        events = await socket.until("response.output_text.delta")
        await eventually(lambda: running.engine.live == 3)
        await asyncio.to_thread(running.engine.fail, "it broke", silently=silently)
        events += await socket.until("response.failed", "response.completed")
        check_response(events)
        assert events[-1]["response"]["error"]["code"] == "engine_failed"
        for status, body in await asyncio.gather(*reads):
            assert (status, body["error"]["code"]) == (503, "engine_failed")
        found = await probes(running)
        assert [status for status, _ in found.values()] == [503, 503]
        assert found["/ready"][1] == {"status": "engine failed"}
        assert found["/health"][1]["status"] == "engine failed"
        status, body = await _post(http, "/v1/responses", {"input": "x"})
        assert (status, body["error"]["code"]) == (503, "engine_failed")
        await socket.create(event_id="late")
        error = await socket.receive()
        assert (error["event_id"], error["error"]["code"], error["status"]) == ("late", "engine_failed", 503)
    await eventually(lambda: running.server.service.admission.in_flight == 0)


async def _post(http: Any, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    async with http.post(path, json=body) as answer:
        return answer.status, await answer.json()


async def test_a_stuck_engine_is_not_ready_and_in_the_end_has_failed(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a step that never ends: balancers look elsewhere soon, and some time later nobody waits."""
    monkeypatch.setattr(vitals, "LOOK_PERIOD_S", 0.01)
    monkeypatch.setattr(vitals, "LOST_AFTER_S", 0.1)
    running = await launch(FakeEngine(LONG))
    running.engine.gate.clear()
    async with running.socket() as socket:
        await socket.create()
        await socket.until("response.in_progress")
        running.engine.stuck_for_s = 31.0
        assert (await probes(running))["/ready"] == (503, {"status": "engine stuck"})
        end = await socket.receive()
        assert (end["type"], end["response"]["error"]["code"]) == ("response.failed", "engine_failed")
        assert (await probes(running))["/health"][0] == 503
    running.engine.cancel(end["response"]["id"])
    await eventually(lambda: running.engine.live == 0)


async def test_a_prompt_that_was_being_tokenised_is_refused_too(launch: Launch) -> None:
    """Guards against a stream that is handed to an engine that has failed meanwhile, and waits for ever."""
    running = await launch(FakeEngine(LONG))
    running.tokenizer.gate.clear()
    async with running.socket() as socket:
        await socket.create(event_id="between")
        await eventually(lambda: len(running.tokenizer.chats) == 1)
        await asyncio.to_thread(running.engine.fail, "it broke", silently=True)
        await eventually(lambda: running.server.service.admission.failure != "")
        running.tokenizer.gate.set()
        error = await socket.receive()
        assert (error["event_id"], error["error"]["code"]) == ("between", "engine_failed")


async def test_a_stuck_engine_that_goes_on_has_not_failed(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a machine that was asleep, and that is taken for an engine that is lost."""
    monkeypatch.setattr(vitals, "LOOK_PERIOD_S", 0.01)
    running = await launch(FakeEngine())
    running.engine.stuck_for_s = 10_000.0
    await asyncio.sleep(0.05)
    running.engine.stuck_for_s = 0.0
    assert (await probes(running))["/ready"] == (200, {"status": "ready"})


async def test_a_cut_answer_says_when_to_come_back_and_is_counted_once(launch: Launch) -> None:
    """Guards against a failure that is also a refusal, and 503 without `Retry-After`."""
    running = await launch(FakeEngine(LONG, step_s=0.01))
    metrics = running.server.service.metrics
    async with running.http() as http:
        reading = asyncio.create_task(http.post("/v1/responses", json={"input": "x"}))
        await eventually(lambda: running.engine.live == 1)
        await asyncio.to_thread(running.engine.fail, "it broke")
        answer = await reading
        assert answer.status == 503
        assert 5 <= int(answer.headers["Retry-After"]) <= 11
    assert metrics.finished == {"failed": 1}
    assert not metrics.refused


@pytest.mark.parametrize("breaks", [Say.DELTA, Say.ITEM_DONE, Say.COMPLETED])
async def test_a_machine_that_breaks_still_says_an_end(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, breaks: Say
) -> None:
    """Guards against streams without a terminal event because of a bug of ours, over HTTP and on sockets."""
    make = ResponseMachine._make

    def broken(self: ResponseMachine, say: Say) -> Any:
        if say is breaks:
            raise ValueError("a bug")
        return make(self, say)

    monkeypatch.setattr(ResponseMachine, "_make", broken)
    running = await launch()
    async with running.http() as http, running.socket() as socket:
        for stream in (True, False):
            async with http.post("/v1/responses", json={"input": "x", "stream": stream}) as answer:
                text = await answer.text()
                if stream:
                    assert text.count("event: response.failed") == 1
                    assert "event: response.completed" not in text
                else:
                    assert (answer.status, (await answer.json())["error"]["code"]) == (500, "internal_error")
        await socket.create()
        assert (await socket.until("response.failed"))[-1]["response"]["error"]["code"] == "server_error"


async def test_an_answer_that_breaks_on_the_way_has_no_second_head(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an error that is written into the middle of an answer, and passes for its text."""

    def broken(event: wire.ServerEvent) -> bytes:
        if isinstance(event, wire.TextDelta):
            raise ValueError("a bug")
        return b"data: {}\n\n"

    monkeypatch.setattr(http_api, "_response_frames", broken)
    running = await launch()
    async with connect(running) as raw:
        raw.send(post(b'{"input": "x", "stream": true}'))
        said = await raw.rest()
    assert said.startswith(b"HTTP/1.1 200")
    assert said.count(b"HTTP/1.1") == 1
    assert not said.endswith(b"0\r\n\r\n")  # nor does it pass for whole


async def test_an_engine_that_cannot_be_looked_at_has_failed(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a watch that ends without a word, and a service that nobody restarts."""
    monkeypatch.setattr(vitals, "LOOK_PERIOD_S", 0.01)
    running = await launch(FakeEngine())
    monkeypatch.setattr(running.engine, "snapshot", lambda: 1 / 0)
    await asyncio.wait_for(running.server.service.vitals.failed.wait(), 5)
    monkeypatch.undo()
    async with running.http() as http:
        status, body = await _post(http, "/v1/responses", {"input": "x"})
    assert (status, body["error"]["code"]) == (503, "engine_failed")
