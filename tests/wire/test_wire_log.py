"""What the log says of requests, and by which id they go."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import websockets

from dspark_stream.errors import InvalidRequestError
from fakes import Script
from wire.harness import Launch, Running, eventually


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """The access log's lines so far, as fields."""
    caplog.set_level(logging.DEBUG)
    return lambda: [r.fields for r in caplog.records if r.name == "dspark_stream.access"]  # type: ignore[attr-defined]


FIGURES = {"input_tokens", "output_tokens", "queue_ms", "prefill_ms", "decode_ms", "tau"}


async def test_one_line_for_every_request(running: Running, lines: Any) -> None:
    """Guards against requests that leave no trace, leave two, or one without the figures."""
    async with running.http() as http:
        for stream in (False, True):
            body = {"input": "a secret prompt", "stream": stream}
            async with http.post("/v1/responses", json=body, headers={"X-Request-Id": f"mine-{stream}"}) as answer:
                assert answer.headers["X-Request-Id"] == f"mine-{stream}"
                await answer.read()
        async with http.post("/v1/chat/completions", json={"messages": []}) as answer:
            assert answer.status == 400
    await eventually(lambda: len(lines()) == 3)
    whole, streamed, refused = lines()
    for line, request_id in ((whole, "mine-False"), (streamed, "mine-True")):
        assert line["request_id"] == request_id
        assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/responses", 200)
        assert (line["client"], line["finish"]) == ("127.0.0.1", "stop")
        assert set(line) >= FIGURES
        assert line["output_tokens"] == 10
        assert line["input_tokens"] == len(running.engine.submitted[0].prompt_ids)
        assert line["tau"] == 2.0  # rounds of three, one and two tokens, five in all
        assert line["response_id"].startswith("resp_")
    assert (refused["status"], refused["route"]) == (400, "/v1/chat/completions")
    assert refused["error"]
    assert "secret" not in repr(lines())


async def test_one_line_for_every_response_on_a_socket(running: Running, lines: Any) -> None:
    """Guards against sockets whose hours of work show as one upgrade; also those that start when another ends."""
    async with running.socket(additional_headers={"X-Request-Id": "the-socket"}) as socket:
        assert socket.connection.response is not None
        assert socket.connection.response.headers["X-Request-Id"] == "the-socket"
        await socket.create()
        await socket.create()  # waits in its lane, and is started by the engine's last event of the first
        await socket.response()
        await socket.response()
        await socket.create(input="")
        await socket.until("error")
        await socket.send({"type": "nonsense"})
        await socket.until("error")
    await eventually(lambda: len(lines()) == 5)
    first, second, empty, nonsense, upgrade = lines()
    assert {line["request_id"] for line in lines()} == {"the-socket"}
    for line in (first, second):
        assert (line["method"], line["status"], line["finish"], line["client"]) == ("WS", 200, "stop", "127.0.0.1")
        assert set(line) >= FIGURES
    assert first["response_id"] != second["response_id"]
    assert (empty["status"], empty["error"]) == (400, "empty_input")
    assert nonsense["status"] == 400
    assert (upgrade["method"], upgrade["status"]) == ("GET", 101)


async def test_how_responses_ended(launch: Launch, lines: Any) -> None:
    """Guards against failures and lost clients that look like answers."""
    running = await launch(Script(fail_after_rounds=1))
    async with running.http() as http, http.post("/v1/responses", json={"input": "x"}) as answer:
        assert answer.status == 500
    running.engine.script = Script(tokens=tuple("w" for _ in range(2000)))
    async with running.socket() as socket:
        await socket.create()
        await socket.until("response.output_text.delta")
    await eventually(lambda: len(lines()) == 3)
    failed, left, _ = sorted(lines(), key=lambda line: ("finish" not in line, line["method"]))
    assert (failed["status"], failed["finish"]) == (500, "failed")
    assert failed["error"]
    assert left["finish"] == "cancelled"
    assert 0 < left["output_tokens"] < 2000


async def test_what_the_engine_refuses_is_only_a_refusal(launch: Launch, lines: Any, tmp_path: Path) -> None:
    """Guards against requests that never were responses among those that clients left, and on their keys' accounts."""
    file = tmp_path / "keys"
    file.write_text("alice:sekret-a\n")
    running = await launch(Script(error=InvalidRequestError("no", param="seed")), api_key_file=file)
    headers = {"Authorization": "Bearer sekret-a"}
    async with running.http(headers=headers) as http, http.post("/v1/responses", json={"input": "x"}) as answer:
        assert answer.status == 400
    async with running.socket(additional_headers=headers) as socket:
        await socket.create()
        await socket.until("error")
    await eventually(lambda: len(lines()) == 3)
    assert {line.get("finish", "refused") for line in lines()} == {"refused"}
    metrics = running.server.service.metrics
    assert metrics.refused["invalid_value"] == 2
    assert not metrics.finished.total()
    assert "client_responses_total{" not in metrics.render(running.engine.snapshot(), running.engine.info, 0)
    assert not running.engine.cancels


@pytest.mark.parametrize("given", ["", "x" * 129, "töröö", "a\tb"])
async def test_ids_that_cannot_be_repeated_are_replaced(running: Running, lines: Any, given: str) -> None:
    """Guards against ids that forge lines of the log or break a head."""
    async with running.http() as http, http.get("/v1/models", headers={"X-Request-Id": given}) as answer:
        assert answer.status == 200
        shown = answer.headers["X-Request-Id"]
    assert shown.startswith("req_")
    await eventually(lambda: len(lines()) == 1)
    assert lines()[0]["request_id"] == shown


async def test_every_answer_says_its_id(launch: Launch, lines: Any) -> None:
    """Guards against errors that nobody can find in the log."""
    running = await launch(api_key="sekret-1")
    headers = {"X-Request-Id": "x" * 128}
    async with running.http(headers=headers) as http:
        for method, path, status in (
            ("GET", "/health", 200),
            ("GET", "/v1/models", 401),
            ("GET", "/nothing/here", 404),
            ("POST", "/v1/responses", 401),
            ("DELETE", "/health", 405),
        ):
            async with http.request(method, path) as answer:
                assert (answer.status, answer.headers["X-Request-Id"]) == (status, "x" * 128), path
    with pytest.raises(websockets.InvalidStatus) as caught:
        async with running.socket(additional_headers=headers):
            pass
    assert caught.value.response.headers["X-Request-Id"] == "x" * 128
    key = ["openai-insecure-api-key.sekret-1"]  # the head is written by another way where no subprotocol is spoken
    async with running.socket(subprotocols=key, additional_headers=headers) as socket:
        assert socket.connection.response is not None
        assert socket.connection.response.headers["X-Request-Id"] == "x" * 128
    await eventually(lambda: len(lines()) == 7)
    assert "sekret" not in repr(lines())


async def test_probes_are_told_to_who_debugs(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a log of nothing but probes."""
    caplog.set_level(logging.INFO)
    async with running.http() as http:
        for path in ("/health", "/ready", "/metrics"):
            async with http.get(path) as answer:
                assert answer.status == 200
    assert not [record for record in caplog.records if record.name == "dspark_stream.access"]


async def test_the_log_can_be_off(launch: Launch, lines: Any) -> None:
    """Guards against a flag that does nothing."""
    running = await launch(access_log=False)
    async with running.http() as http, http.get("/v1/models") as answer:
        assert answer.headers["X-Request-Id"]
    async with running.socket() as socket:
        await socket.create()
        await socket.response()
    await eventually(lambda: sum(running.server.service.metrics.http.values()) == 2)
    assert not lines()


async def test_how_responses_on_a_socket_ended_before_they_began(launch: Launch, lines: Any) -> None:
    """Guards against cancels that look like refusals or leave no line, wherever in its life a response was."""
    running = await launch()
    running.tokenizer.gate.clear()
    async with running.socket() as socket:
        await socket.create(stream_id="a")
        await eventually(lambda: len(running.tokenizer.chats) == 1)
        await socket.create(stream_id="a")  # waits in its lane
        await socket.send({"type": "response.cancel", "stream_id": "a"})
        for _ in range(2):
            await socket.until("response.cancelled")
        await eventually(lambda: len(lines()) == 2)
        await socket.create(stream_id="b")
        await socket.create(stream_id="b")
    await eventually(lambda: len(lines()) == 5)
    running.tokenizer.gate.set()
    *ended, upgrade = lines()
    assert upgrade["method"] == "GET"
    assert [(line["status"], line["finish"]) for line in ended] == [(200, "cancelled")] * 4
    assert len({line["response_id"] for line in ended}) == 4


async def test_a_turn_that_only_prepares_is_a_response(running: Running, lines: Any) -> None:
    """Guards against a turn that was taken and is logged as refused."""
    async with running.socket() as socket:
        await socket.create(generate=False)
        await socket.response()
    await eventually(lambda: len(lines()) == 2)
    assert (lines()[0]["status"], lines()[0]["finish"]) == (200, "stop")
    assert running.server.service.metrics.finished == {"stop": 1}


async def test_a_failed_response_on_a_socket_has_its_errors_status(launch: Launch, lines: Any) -> None:
    """Guards against failures that a search for 5xx does not find."""
    running = await launch(Script(fail_after_rounds=1))
    async with running.socket() as socket:
        await socket.create()
        await socket.until("response.failed")
    await eventually(lambda: len(lines()) == 2)
    assert (lines()[0]["status"], lines()[0]["finish"], lines()[0]["error"]) == (500, "failed", "internal_error")
