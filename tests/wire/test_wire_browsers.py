"""What browsers need: CORS for the pages of allowed origins, and an answer to a key that came as a subprotocol."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from dspark_stream.errors import BusyError
from fakes import FakeEngine, model_info
from wire.harness import Launch, Running, eventually
from wire.raw import HEAD, UPGRADE, ask

PAGE = "https://app.example"
KEY = "sekret-1"
BEARER = {"Authorization": f"Bearer {KEY}"}
ROUTES = [
    ("POST", "/v1/responses"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake-135m"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/props"),
    ("GET", "/metrics"),
    ("GET", "/nothing"),
]
ASKED = "authorization,content-type,x-stainless-lang"


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": ASKED,
    }


def allowed(answer: aiohttp.ClientResponse) -> str | None:
    return answer.headers.get("Access-Control-Allow-Origin")


@pytest.mark.parametrize("key", ["", KEY])
async def test_an_allowed_page_may_ask_everywhere(launch: Launch, key: str) -> None:
    """Guards against an allowed origin that no browser can use: preflights carry no key, and are not refused for it."""
    running = await launch(api_key=key, allowed_origins=(PAGE, "http://other.example"))
    async with running.http() as http:
        for method, path in ROUTES:
            async with http.options(path, headers=preflight(PAGE, method)) as answer:
                assert (answer.status, allowed(answer)) == (204, PAGE), path
                assert method in answer.headers["Access-Control-Allow-Methods"].split(", ")
                assert answer.headers["Access-Control-Allow-Headers"] == ASKED
                assert "Origin" in answer.headers["Vary"]
            for origin in ("https://evil.example", "https://app.example:444", "null"):
                async with http.options(path, headers=preflight(origin, method)) as answer:
                    assert allowed(answer) is None
                    assert answer.status in (403, 405)  # 405: probes are open, and know no OPTIONS
    assert not running.engine.submitted


async def test_what_a_preflight_asks_for_is_not_repeated_blindly(launch: Launch) -> None:
    """Guards against headers of our answers that a stranger writes."""
    running = await launch(allowed_origins=(PAGE,))
    async with running.http() as http:
        for names in ("x" * 3000, "a\u00e9", 'a"b'):
            headers = {**preflight(PAGE), "Access-Control-Request-Headers": names}
            async with http.options("/v1/responses", headers=headers) as answer:
                assert (answer.status, answer.headers.get("Access-Control-Allow-Headers")) == (204, None)


async def test_an_allowed_page_may_read_every_answer(launch: Launch) -> None:
    """Guards against errors that a page sees as "network error", and streams that it may not read."""
    engine = FakeEngine(info=model_info(max_num_seqs=1))
    running = await launch(engine, api_key=KEY, allowed_origins=(PAGE,), max_queue=0, max_message_bytes=4000)
    page = {"Origin": PAGE}
    whole: dict[str, Any] = {"input": "x"}
    cases: list[tuple[int, str, str, dict[str, Any]]] = [
        (200, "GET", "/v1/models", {"headers": {**page, **BEARER}}),
        (200, "GET", "/health", {"headers": page}),
        (200, "POST", "/v1/responses", {"headers": {**page, **BEARER}, "json": whole}),
        (200, "POST", "/v1/responses", {"headers": {**page, **BEARER}, "json": {**whole, "stream": True}}),
        (400, "POST", "/v1/responses", {"headers": {**page, **BEARER}, "json": {}}),
        (401, "GET", "/v1/models", {"headers": page}),
        (404, "GET", "/nothing", {"headers": page}),
        (405, "DELETE", "/v1/models", {"headers": {**page, **BEARER}}),
        (413, "POST", "/v1/responses", {"headers": {**page, **BEARER}, "json": {"input": "x" * 5000}}),
        (415, "POST", "/v1/responses", {"headers": {**page, **BEARER}, "data": b"x"}),
        (426, "GET", "/v1/responses", {"headers": {**page, **BEARER}}),
    ]
    async with running.http() as http:
        for status, method, path, options in cases:
            async with http.request(method, path, **options) as answer:
                assert (answer.status, allowed(answer)) == (status, PAGE), (method, path)
                exposed = answer.headers["Access-Control-Expose-Headers"].lower()
                assert "x-request-id" in exposed
                assert "retry-after" in exposed
                await answer.read()
        engine.gate.clear()
        first = asyncio.create_task(_post(http, {**page, **BEARER}))
        await eventually(lambda: engine.live == 1)
        async with http.post("/v1/responses", json=whole, headers={**page, **BEARER}) as answer:
            assert (answer.status, allowed(answer)) == (503, PAGE)
            assert answer.headers["Retry-After"]
        engine.gate.set()
        await first
        running.tokenizer.error = RuntimeError("exploded")
        async with http.post("/v1/responses", json=whole, headers={**page, **BEARER}) as answer:
            assert (answer.status, allowed(answer)) == (500, PAGE)


async def _post(http: aiohttp.ClientSession, headers: dict[str, str]) -> None:
    async with http.post("/v1/responses", json={"input": "x"}, headers=headers) as answer:
        await answer.read()


async def test_nobody_else_is_told_anything_of_origins(launch: Launch, running: Running) -> None:
    """Guards against CORS headers for foreign pages, and where no origin was allowed."""
    allowing = await launch(allowed_origins=(PAGE,))
    for server in (allowing, running):
        async with server.http() as http:
            for origin in ("https://evil.example", None):
                headers = {"Origin": origin} if origin else {}
                for path in ("/v1/models", "/health", "/nothing"):
                    async with http.get(path, headers=headers) as answer:
                        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
                        assert ("Origin" in answer.headers.get("Vary", "")) == (server is allowing)


# --- sockets ---------------------------------------------------------------------------------------------------------

KEYED = f"openai-insecure-api-key.{KEY}"


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        ([f"{KEYED}"], KEYED),
        (["realtime", KEYED], "realtime"),
        ([KEYED, "realtime"], "realtime"),
        (["realtime", KEYED, "openai-beta.realtime-v1"], "realtime"),
        ([KEYED, "openai-beta.responses-v1"], "openai-beta.responses-v1"),
        (["dspark.v1+json", KEYED], "dspark.v1+json"),
        (["realtime", KEYED, "dspark.v1+msgpack"], "dspark.v1+msgpack"),
    ],
)
async def test_a_key_as_a_subprotocol_gets_an_answer(launch: Launch, offered: list[str], taken: str) -> None:
    """Guards against a 101 that browsers must drop: they offered subprotocols and were told of none."""
    running = await launch(api_key=KEY, allowed_origins=(PAGE,))
    # In one header and in several.
    for lines in ([", ".join(offered)], offered):
        headers = f"Origin: {PAGE}\r\n" + "".join(f"Sec-WebSocket-Protocol: {line}\r\n" for line in lines)
        answer = await ask(running, f"GET /v1/responses HTTP/1.1\r\n{HEAD}{UPGRADE}{headers}\r\n")
        assert (answer.status, answer.headers["sec-websocket-protocol"]) == (101, taken)
    async with running.socket(subprotocols=offered, origin=PAGE) as socket:
        assert socket.hello["protocol"] == ("dspark.v1+msgpack" if taken.endswith("msgpack") else "dspark.v1+json")
        await socket.create()
        assert (await socket.response())[-1]["type"] == "response.completed"


@pytest.mark.parametrize("key", ["", KEY])
async def test_names_that_we_do_not_know_are_not_promised(launch: Launch, key: str) -> None:
    """Guards against agreeing to a protocol that we do not speak, and a 500 for bytes that are none."""
    running = await launch(api_key=key)
    bearer = f"Authorization: Bearer {KEY}\r\n"
    for offered, taken in (
        ("graphql-ws", None),
        ("\xff\xfe", None),
        (", ,", None),
        (f"\xff, a b, {KEYED}", KEYED),
    ):
        headers = f"{bearer}Sec-WebSocket-Protocol: {offered}\r\n"
        answer = await ask(running, f"GET /v1/responses HTTP/1.1\r\n{HEAD}{UPGRADE}{headers}\r\n")
        assert (answer.status, answer.headers.get("sec-websocket-protocol")) == (101, taken)


# --- what is not there, and when to come back -------------------------------------------------------------------------


async def test_an_unknown_path_is_404_for_every_method_and_names_what_exists(running: Running) -> None:
    """Guards against 405 for a wrong base URL: people then look for a method that would work."""
    async with running.http() as http:
        for path, near in (
            ("/chat/completions", "/v1/chat/completions"),
            ("/v1/chat/completions/", "/v1/chat/completions"),
            ("/responses", "/v1/responses"),
            ("/v1/embeddings", None),
            ("/", None),
        ):
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
                async with http.request(method, path, json={}) as answer:
                    assert answer.status == 404, (method, path)
                    error = (await answer.json())["error"]
                    assert error["code"] == "not_found"
                    for known in ("/v1/responses", "/v1/chat/completions", "/v1/models", "/health"):
                        assert known in error["message"]
                    assert near is None or f"did you mean {near}?" in error["message"]


@pytest.mark.parametrize(
    ("path", "methods", "wrong"),
    [
        ("/v1/responses", {"GET", "POST"}, "PUT"),
        ("/v1/chat/completions", {"POST"}, "GET"),
        ("/v1/models", {"GET", "HEAD"}, "POST"),
        ("/v1/models/fake-135m", {"GET", "HEAD"}, "DELETE"),
        ("/health", {"GET", "HEAD"}, "POST"),
    ],
)
async def test_a_known_path_says_which_methods_it_has(
    running: Running, path: str, methods: set[str], wrong: str
) -> None:
    """Guards against 404 for what is there."""
    async with running.http() as http, http.request(wrong, path) as answer:
        assert answer.status == 405
        assert set(answer.headers["Allow"].split(",")) == methods
        message = (await answer.json())["error"]["message"]
        assert all(method in message for method in methods)


def test_those_refused_together_do_not_come_back_together() -> None:
    """Guards against a crowd that returns in the same second."""
    for base in (1, 2, 5, 30):
        said = {BusyError("busy", retry_after_s=base).retry_after_s for _ in range(200)}
        assert len(said) > 1
        assert min(said) >= base
        assert max(said) <= 2 * base + 1


async def test_how_long_to_wait_follows_how_long_streams_last(launch: Launch) -> None:
    """Guards against two seconds for a server whose answers take a minute."""
    running = await launch()
    admission = running.server.service.admission
    for _ in range(50):
        admission.lasted(20.0)
    assert admission.wait_s in (19, 20)
    for _ in range(100):
        admission.lasted(0.01)
    assert admission.wait_s == 1
    for _ in range(100):
        admission.lasted(3600)
    assert admission.wait_s == 30
