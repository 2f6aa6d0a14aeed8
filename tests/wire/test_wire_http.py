"""The HTTP side: event streams, single bodies, chat completions, errors, figures and files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from dspark_stream.errors import ContextLengthError
from fakes import FakeEngine, Script, model_info
from wire.harness import Launch, Running, check_response, eventually, text_of

WORDS = "".join(f"w{i} " for i in range(10))
CHAT: dict[str, Any] = {"model": "fake-135m", "messages": [{"role": "user", "content": "hello"}]}


async def sse(answer: aiohttp.ClientResponse) -> list[tuple[str | None, Any]]:
    """(event, data) of an event stream."""
    found = []
    for block in (await answer.text()).split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines:
            data = lines["data"]
            found.append((lines.get("event"), data if data == "[DONE]" else json.loads(data)))
    return found


# --- responses ----------------------------------------------------------------------------------------------------


async def test_responses_as_an_event_stream(running: Running) -> None:
    """Guards against SSE that says something else than the socket, or buffers on its way."""
    async with running.http() as http, http.post("/v1/responses", json={"input": "hello", "stream": True}) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        assert answer.headers["Cache-Control"] == "no-store"
        events = await sse(answer)
    assert all(name == data["type"] for name, data in events)
    check_response([data for _, data in events])
    assert text_of([data for _, data in events]) == WORDS
    assert events[-1][0] == "response.completed"


async def test_responses_as_one_body(running: Running) -> None:
    """Guards against a body that differs from the stream's last event."""
    async with running.http() as http:
        async with http.post("/v1/responses", json={"input": "hello", "metadata": {"k": "v"}}) as answer:
            assert answer.status == 200
            first = await answer.json()
        assert first["object"] == "response"
        assert first["output"][0]["content"][0]["text"] == WORDS
        assert first["usage"]["total_tokens"] == first["usage"]["input_tokens"] + 10
        body = {"input": "more", "previous_response_id": first["id"], "max_output_tokens": 3}
        async with http.post("/v1/responses", json=body) as answer:
            second = await answer.json()
        assert second["status"] == "incomplete"
    assert running.tokenizer.chats[1] == [("user", "hello"), ("assistant", WORDS), ("user", "more")]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
async def test_a_failed_stream_is_an_http_error_or_an_event(launch: Launch, path: str) -> None:
    """Guards against a failure that looks like a short answer."""
    running = await launch(Script(fail_after_rounds=1))
    body = {"input": "x"} if path == "/v1/responses" else CHAT
    async with running.http() as http:
        async with http.post(path, json=body) as answer:
            assert answer.status == 500
            assert (await answer.json())["error"]["message"] == "the engine failed on purpose"
        async with http.post(path, json={**body, "stream": True}) as answer:
            assert answer.status == 200
            events = await sse(answer)
    if path == "/v1/responses":
        assert events[-1][0] == "response.failed"
    else:
        assert events[-2][1]["error"]["message"] == "the engine failed on purpose"


# --- chat ---------------------------------------------------------------------------------------------------------


async def test_chat_as_a_stream(running: Running) -> None:
    """Guards against chunks that clients and benchmarks of the chat API cannot read."""
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "seed": 3, "max_tokens": 50}
    async with running.http() as http, http.post("/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        events = [data for _, data in await sse(answer)]
    assert events.pop() == "[DONE]"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == WORDS
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 2) + ["stop"]
    assert all(event["usage"] is None for event in events[:-1])
    final = events[-1]
    assert final["choices"] == []
    assert final["usage"]["completion_tokens"] == 10
    figures = final["metrics"]["speculative_decoding"]
    assert figures["num_spec_steps"] == 5
    assert figures["num_draft_tokens"] == 20
    assert figures["num_accepted_draft_tokens"] == 5
    assert figures["mean_acceptance_length"] == 2.0
    assert figures["draft_acceptance_rate"] == 0.25
    assert sum(figures["acceptance_histogram"]) == figures["num_spec_steps"]
    assert len(figures["acceptance_histogram"]) == figures["num_spec_tokens"] + 1
    assert running.engine.submitted[0].sampling.seed == 3


async def test_chat_without_usage_has_its_figures_in_the_last_chunk(running: Running) -> None:
    """Guards against a usage chunk that nobody asked for: strict clients index its empty choices."""
    async with running.http() as http, http.post("/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        events = [data for _, data in await sse(answer)][:-1]
    assert all(len(event["choices"]) == 1 and "usage" not in event for event in events)
    assert events[-1]["metrics"]["speculative_decoding"]["num_spec_steps"] == 5


async def test_chat_as_one_body(running: Running) -> None:
    """Guards against the same in one body, and a cut answer that says it is whole."""
    body = {
        "messages": [
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "go on", "name": "ann"},
        ],
        "max_completion_tokens": 4,
        "n": 1,
        "stop": "END",
        "logprobs": False,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "response_format": {"type": "text"},
        "top_k": -1,
        "min_p": 0.05,
        "ignore_eos": True,
    }
    async with running.http() as http, http.post("/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        completion = await answer.json()
    assert completion["object"] == "chat.completion"
    assert completion["choices"][0]["message"]["content"] == "w0 w1 w2 w3 "
    assert completion["choices"][0]["finish_reason"] == "length"
    assert completion["usage"]["completion_tokens"] == 4
    assert running.tokenizer.chats == [[("system", "rules"), ("user", "hi"), ("assistant", "yes?"), ("user", "go on")]]
    sampling = running.engine.submitted[0].sampling
    assert (sampling.stop, sampling.min_p, sampling.top_k, sampling.ignore_eos) == (("END",), 0.05, 0, True)


BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}]},
        "messages[1].tool_calls",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{}]}, "tools"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -2}, "max_completion_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"stop": [""]}, "stop[0]"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"temperature": -1}, "temperature"),
    ({"model": "nope"}, "model"),
    ({"input": "x"}, "input"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHAT, ids=lambda v: str(v)[:50])
async def test_bad_chat_bodies_name_the_field(running: Running, fields: dict[str, Any], param: str) -> None:
    """Guards against options that are ignored without a word."""
    async with running.http() as http, http.post("/v1/chat/completions", json={**CHAT, **fields}) as answer:
        assert answer.status in (400, 404)
        error = (await answer.json())["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not running.engine.submitted


async def test_the_engines_refusals_speak_the_clients_words(launch: Launch) -> None:
    """Guards against an error about a field that the client's API does not have, and a place that it keeps."""
    running = await launch(Script(error=ContextLengthError("too much", param="max_tokens")))
    async with running.http() as http:
        for path, body, param in (
            ("/v1/chat/completions", CHAT, "max_tokens"),
            ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 5, "stream": True}, "max_completion_tokens"),
            ("/v1/responses", {"input": "x"}, "max_output_tokens"),
        ):
            async with http.post(path, json=body) as answer:
                assert answer.status == 400
                assert (await answer.json())["error"]["param"] == param


# --- errors of HTTP itself ------------------------------------------------------------------------------------------


async def test_http_errors_have_the_apis_shape(launch: Launch) -> None:
    """Guards against HTML or plain text where a client parses JSON."""
    running = await launch(max_message_bytes=5_000)
    json_type = {"Content-Type": "application/json"}
    async with running.http() as http:
        for method, path, options, status in (
            ("GET", "/v1/nothing", {}, 404),
            ("PUT", "/v1/responses", {}, 405),
            ("GET", "/v1/chat/completions", {}, 405),
            ("GET", "/v1/responses", {}, 426),
            ("POST", "/v1/responses", {"data": b"{bad", "headers": json_type}, 400),
            ("POST", "/v1/responses", {"data": b"\xff\xfe", "headers": json_type}, 400),
            ("POST", "/v1/responses", {"data": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
            ("POST", "/v1/responses", {"data": b"x" * 6_000, "headers": json_type}, 413),
            ("POST", "/v1/responses", {"json": {"input": "x", "stream_id": "a"}}, 400),
            ("POST", "/v1/responses", {"json": {"input": "x", "dspark": {"steps": 1}}}, 400),
            ("GET", "/v1/models/none", {}, 404),
        ):
            async with http.request(method, path, **options) as answer:
                assert answer.status == status, (method, path)
                error = (await answer.json())["error"]
                assert error["message"]
                assert error["code"]
                assert {"type", "param"} <= error.keys()


async def test_refusals_say_when_to_come_back(launch: Launch) -> None:
    """Guards against clients that hammer a full server because it does not say when to try again."""
    engine = FakeEngine(info=model_info(max_num_seqs=1))
    running = await launch(engine, max_queue=0)
    engine.gate.clear()
    async with running.http() as http:
        first = asyncio.create_task(_post(http, {"input": "x"}))
        await eventually(lambda: engine.live == 1)
        async with http.post("/v1/responses", json={"input": "y", "stream": True}) as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
        engine.gate.set()
        assert (await first)["status"] == "completed"


async def _post(http: aiohttp.ClientSession, body: dict[str, Any]) -> Any:
    async with http.post("/v1/responses", json=body) as answer:
        return await answer.json()


async def test_a_body_that_never_comes(launch: Launch) -> None:
    """Guards against connections that are held open by sending nothing."""
    running = await launch(body_timeout_s=0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
    writer.write(
        b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
    )
    assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


async def test_a_silent_event_stream_is_kept_alive(launch: Launch) -> None:
    """Guards against proxies that cut a stream while its prompt is read."""
    engine = FakeEngine()
    running = await launch(engine, heartbeat_s=0.05)
    engine.gate.clear()
    async with running.http() as http, http.post("/v1/responses", json={"input": "x", "stream": True}) as answer:
        async with asyncio.timeout(5):
            while await answer.content.readuntil(b"\n\n") != b": still here\n\n":
                pass
        engine.gate.set()
        assert b"response.completed" in await answer.read()


# --- what costs no tokens ------------------------------------------------------------------------------------------


async def test_models_probes_and_props(running: Running) -> None:
    """Guards against the small answers that other programs rely on."""
    async with running.http() as http:
        async with http.get("/v1/models") as answer:
            listing = await answer.json()
        assert listing["object"] == "list"
        assert [(m["id"], m["object"]) for m in listing["data"]] == [("fake-135m", "model")]
        async with http.get("/v1/models/fake-135m") as answer:
            assert (await answer.json())["max_model_len"] == 2048
        async with http.get("/props") as answer:
            props = await answer.json()
        assert props["model"]["drafter"] == "fake-drafter"
        assert props["limits"]["max_queue"] == 2048
        async with http.get("/ready") as answer:
            assert (answer.status, await answer.json()) == (200, {"status": "ready"})
        running.engine.stuck_for_s = 60.0
        async with http.get("/ready") as answer:
            assert answer.status == 503
        async with http.head("/health") as answer:
            assert answer.status == 200


@pytest.fixture
def web_dir(tmp_path: Path) -> Path:
    (tmp_path / "web" / "vendor").mkdir(parents=True)
    (tmp_path / "web" / "index.html").write_text("<!doctype html><title>page</title>")
    (tmp_path / "web" / "vendor" / "a.js").write_text("export const a = 1;")
    (tmp_path / "web" / ".hidden").write_text("hidden")
    (tmp_path / "secret.txt").write_text("treasure")
    (tmp_path / "web" / "link.txt").symlink_to(tmp_path / "secret.txt")
    return tmp_path / "web"


async def test_the_page_is_served_strictly(launch: Launch, web_dir: Path) -> None:
    """Guards against a page that runs foreign scripts, or old modules with a new page."""
    running = await launch(web_dir=web_dir)
    async with running.http() as http:
        async with http.get("/") as answer:
            assert (answer.status, answer.content_type) == (200, "text/html")
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            assert f"ws://127.0.0.1:{running.server.port}" in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert answer.headers["Cache-Control"] == "no-cache"
            etag = answer.headers["ETag"]
        async with http.get("/", headers={"If-None-Match": etag}) as answer:
            assert answer.status == 304
        async with http.get("/vendor/a.js") as answer:
            assert (answer.status, answer.content_type) == (200, "text/javascript")


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/vendor/../../secret.txt",
        "/.hidden",
        "/link.txt",
        "/vendor",
        "/%00",
        "//etc/passwd",
        "/" + "a" * 3000,
    ],
    ids=lambda path: path[:30],
)
async def test_nothing_else_is_served(launch: Launch, web_dir: Path, path: str) -> None:
    """Guards against paths, links and encodings that lead out of the page's folder."""
    running = await launch(web_dir=web_dir)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    data = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert data.split(b" ")[1] in (b"404", b"400"), data[:200]
    assert b"treasure" not in data
