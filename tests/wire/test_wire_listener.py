"""Connections: their limits, what a strange head gets, and that none of it reaches a log or the others."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import struct
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from dspark_stream.server import connections, listener
from dspark_stream.server.connections import MAX_HEAD_BYTES
from fakes import FakeEngine
from wire.harness import Launch, Running, eventually
from wire.raw import HEAD, UPGRADE, Raw, ask, connect, frame, post

KEY = "sekret-1"
BEARER = f"Authorization: Bearer {KEY}\r\n"


def cut(running: Running) -> dict[str, int]:
    return dict(running.server.service.metrics.connections_cut)


def open_connections(running: Running) -> int:
    return running.server.service.metrics.connections_open


# --- bodies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip", "nonsense"])
async def test_a_compressed_body_is_refused_by_the_name_of_its_header(launch: Launch, encoding: str) -> None:
    """Guards against a megabyte that becomes a gigabyte, and against 500 for one that is not what it says."""
    running = await launch(api_key=KEY)
    for body in (gzip.compress(b'{"input":"x"}'), b'{"input":"x"}'):
        answer = await ask(running, post(body, f"{BEARER}Content-Encoding: {encoding}\r\n"))
        assert (answer.status, answer.error["code"]) == (415, "unsupported_content_encoding")
        assert "Content-Encoding" in answer.error["message"]
        # The key comes first.
        assert (await ask(running, post(body, f"Content-Encoding: {encoding}\r\n"))).status == 401


async def test_identity_is_no_encoding(running: Running) -> None:
    """Guards against refusing clients that say that they do not compress."""
    assert (await ask(running, post(headers="Content-Encoding: Identity\r\n"))).status == 200


async def test_nothing_is_unpacked_for_strangers(launch: Launch) -> None:
    """Guards against keyless requests that stop everybody: unpacking this body takes seconds."""
    running = await launch(api_key=KEY)
    bomb = gzip.compress(bytes(64 << 20))
    async with asyncio.timeout(2), AsyncExitStack() as stack:
        for path in ("/v1/responses", "/nothing", "/health"):
            raw = await stack.enter_async_context(connect(running))
            raw.send(post(bomb, "Content-Encoding: gzip\r\n", path))
            assert (await raw.answer()).status in (401, 415)
        assert (await ask(running, f"GET /health HTTP/1.1\r\n{HEAD}\r\n")).status == 200


async def test_100_continue_is_said_to_those_who_may_go_on(launch: Launch) -> None:
    """Guards against asking a stranger for a body, and against a client that waits for ever to be asked."""
    running = await launch(api_key=KEY, max_message_bytes=1000)
    expect = f"POST /v1/responses HTTP/1.1\r\n{HEAD}Expect: 100-continue\r\n"
    assert (await ask(running, f"{expect}Content-Length: 13\r\n\r\n")).status == 401
    assert (await ask(running, f"{expect}{BEARER}Content-Length: 1001\r\n\r\n")).status == 413
    answer = await ask(running, post(headers=f"{BEARER}Expect: the-unexpected\r\n"))
    assert (answer.status, answer.error["code"]) == (417, "expectation_failed")
    async with connect(running) as raw:
        raw.send(f"{expect}{BEARER}Content-Length: 13\r\n\r\n")
        assert (await raw.answer()).status == 100
        raw.send('{"input":"x"}')
        assert (await raw.answer()).status == 200


@pytest.mark.parametrize("coding", ["gzip, chunked", "identity, chunked", "deflate,chunked"])
async def test_transfer_codings_other_than_chunked_are_refused(launch: Launch, coding: str) -> None:
    """Guards against a body that is read as something that it does not say it is."""
    running = await launch(api_key=KEY)
    request = (
        f'POST /v1/responses HTTP/1.1\r\n{HEAD}%sTransfer-Encoding: {coding}\r\n\r\nd\r\n{{"input":"x"}}\r\n0\r\n\r\n'
    )
    async with connect(running) as raw:
        raw.send(request % BEARER)
        answer = await raw.answer()
        assert (answer.status, answer.error["code"]) == (501, "unsupported_transfer_encoding")
        assert await raw.rest() == b""
    assert (await ask(running, request % "")).status == 401


async def test_plain_chunks_are_read(running: Running) -> None:
    """Guards against refusing every client that streams its body."""
    for coding in ("chunked", "Chunked"):
        head = f"POST /v1/responses HTTP/1.1\r\n{HEAD}Transfer-Encoding: {coding}\r\n\r\n"
        assert (await ask(running, head + 'd\r\n{"input":"x"}\r\n0\r\n\r\n')).status == 200


async def test_a_body_that_breaks_off_in_garbage_is_answered_at_once(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a handler that waits for the rest, a 500, and the prompt in the log."""
    async with connect(running) as raw:
        raw.send(f"POST /v1/responses HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n")
        raw.send('d\r\n{"input":')
        await eventually(lambda: open_connections(running) == 1)
        await asyncio.sleep(0.05)  # the head was handed on, and its handler waits
        raw.send('"secret" and more than 13 bytes')
        answer = await raw.answer()
        assert (answer.status, answer.error["code"]) == (400, "invalid_body")
        assert await raw.rest() == b""
    assert running.server.service.metrics.heads_refused == {"invalid_body": 1}
    assert "ecret" not in caplog.text
    assert "Traceback" not in caplog.text


# --- heads that are refused -----------------------------------------------------------------------------------------

MALFORMED = {
    "return in a value": f"GET /props HTTP/1.1\r\n{HEAD}Authorization: Bearer SEKRET\r\r\n\r\n",
    "control character": f"GET /props HTTP/1.1\r\n{HEAD}Authorization: Bearer SEKRET\x01\r\n\r\n",
    "null": f"GET /props HTTP/1.1\r\n{HEAD}Authorization: Bearer SEKRET\0\r\n\r\n",
    "space before the colon": f"GET /props HTTP/1.1\r\n{HEAD}Authorization : Bearer SEKRET\r\n\r\n",
    "bare line feeds": "GET /props HTTP/1.1\nHost: x\nAuthorization: Bearer SEKRET\n\n",
    "subprotocol": f"GET /v1/responses HTTP/1.1\r\n{HEAD}Sec-WebSocket-Protocol: SEKRET\r\r\n\r\n",
    "long line": f"GET /props?key=SEKRET&x={'a' * 9000} HTTP/1.1\r\n{HEAD}\r\n",
    "long header": f"GET /props HTTP/1.1\r\n{HEAD}Authorization: Bearer SEKRET{'a' * 9000}\r\n\r\n",
    "long head": f"GET /props HTTP/1.1\r\n{HEAD}A: SEKRET\r\n" + f"B: {'b' * 8000}\r\n" * 9,
    "many headers": f"GET /props HTTP/1.1\r\n{HEAD}{'A: SEKRET' + chr(13) + chr(10)}" + "B: b\r\n" * 200 + "\r\n",
    "version": f"GET /props?key=SEKRET HTTP/9.9\r\n{HEAD}\r\n",
    "method": f"SEKRET / HTTP/1.1\r\n{HEAD}\r\n",
    "target": f"GET SEKRET HTTP/1.1\r\n{HEAD}\r\n",
    "old handshake": f"GET / HTTP/1.1\r\n{HEAD}Sec-WebSocket-Key1: SEKRET\r\n\r\n",
    "two lengths": f"POST / HTTP/1.1\r\n{HEAD}Content-Length: 6\r\nContent-Length: 7\r\n\r\nSEKRET",
    "length and chunks": f"POST / HTTP/1.1\r\n{HEAD}Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\nSEKRET",
    "two hosts": "GET / HTTP/1.1\r\nHost: localhost\r\nHost: SEKRET\r\n\r\n",
    "no host": "GET /?SEKRET HTTP/1.1\r\n\r\n",
    "bad chunk": f"POST / HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n6\nSEKRET\n0\n\n",
    "no HTTP": "\x16\x03\x01\x02SEKRET\r\n\r\n",
}


async def test_nothing_of_a_refused_head_is_repeated(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against keys and prompts in logs and answers, and logs that strangers fill."""
    caplog.set_level(logging.INFO)
    for name, request in MALFORMED.items():
        async with connect(running) as raw:
            raw.send(request)
            answer = await raw.answer()
            assert answer.status in (400, 431), name
            assert answer.error["type"] == "invalid_request_error", name
            assert answer.headers["server"] == "dspark-stream"
            assert answer.headers["x-request-id"].startswith("req_")
            assert "SEKRET" not in answer.head + answer.body.decode()
            assert await raw.rest() == b"", name
    assert "SEKRET" not in caplog.text
    assert "Traceback" not in caplog.text
    assert sum(running.server.service.metrics.heads_refused.values()) == len(MALFORMED)
    assert sum("not HTTP" in record.getMessage() for record in caplog.records) == 1
    async with running.http() as http, http.get("/metrics") as page:
        assert 'http_requests_malformed_total{model_name="fake-135m",code="invalid_method"} 2' in await page.text()


async def test_a_refused_head_says_which_rule_it_breaks(running: Running) -> None:
    """Guards against an answer from which nobody can tell what to mend."""
    for name, words in (
        ("length and chunks", "Transfer-Encoding can't be present with Content-Length"),
        ("long header", "8190 bytes"),
        ("long head", f"{MAX_HEAD_BYTES} bytes"),
        ("no HTTP", "TLS"),
    ):
        assert words in (await ask(running, MALFORMED[name])).error["message"]


async def test_answers_do_not_say_what_we_run_on(launch: Launch, tmp_path: Path) -> None:
    """Guards against versions that tell strangers which faults to try."""
    (tmp_path / "index.html").write_text("page")
    running = await launch(web_dir=tmp_path)
    for request in (f"GET / HTTP/1.1\r\n{HEAD}\r\n", f"GET /v1/responses HTTP/1.1\r\n{HEAD}{UPGRADE}\r\n", post()):
        assert (await ask(running, request)).headers["server"] == "dspark-stream"


# --- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["", "GET /v1/", f"GET /v1/models HTTP/1.1\r\n{HEAD}X: "])
async def test_a_head_has_so_long(launch: Launch, sent: str) -> None:
    """Guards against connections that are held by sending nothing, or a byte now and then."""
    running = await launch(head_timeout_s=0.2)
    async with connect(running) as raw:
        raw.send(sent)
        drip = asyncio.create_task(_drip(raw)) if sent else None
        said = await raw.rest()
        if drip is not None:
            drip.cancel()
            assert said.startswith(b"HTTP/1.1 408 ")
            assert b"X-Request-Id: req_" in said
            assert b'"request_timeout"' in said
        else:
            assert said == b""
    assert cut(running) == {"head_timeout": 1}


async def _drip(raw: Raw) -> None:
    while True:
        await asyncio.sleep(0.05)
        raw.send("a")


async def test_a_connection_may_be_idle_so_long(launch: Launch) -> None:
    """Guards against clients that are gone, or never come back, and keep their connections."""
    running = await launch(keep_alive_timeout_s=0.2, head_timeout_s=0.2)
    async with connect(running) as raw:
        for _ in range(2):
            raw.send(f"GET /health HTTP/1.1\r\n{HEAD}\r\n")
            assert (await raw.answer()).status == 200
            await asyncio.sleep(0.05)
        assert await raw.rest() == b""
    assert cut(running) == {"idle_timeout": 1}
    async with connect(running) as raw:
        raw.send(f"GET /health HTTP/1.1\r\n{HEAD}\r\nGET /health")
        assert (await raw.answer()).status == 200
        assert (await raw.rest()).startswith(b"HTTP/1.1 408 ") or cut(running)["idle_timeout"] == 2


async def test_a_long_answer_is_not_cut_by_any_of_these(launch: Launch) -> None:
    """Guards against limits for strangers that hit whoever waits for a slow model."""
    running = await launch(FakeEngine(step_s=0.1), head_timeout_s=0.1, keep_alive_timeout_s=0.1, body_timeout_s=0.1)
    answer = await ask(running, post())
    assert (answer.status, cut(running)) == (200, {})


async def test_a_plain_answer_that_nobody_reads(launch: Launch, tmp_path: Path) -> None:
    """Guards against answers that lie in memory for a reader who has stopped, for as long as he likes."""
    (tmp_path / "big.txt").write_bytes(bytes(8 << 20))
    running = await launch(web_dir=tmp_path, slow_reader_timeout_s=0.3)
    async with connect(running, receive_buffer=4096) as raw:
        raw.send(f"GET /big.txt HTTP/1.1\r\n{HEAD}\r\n")
        await eventually(lambda: cut(running) == {"unread": 1})
        await eventually(lambda: open_connections(running) == 0)
    async with connect(running, receive_buffer=4096) as raw:
        # Small answers too: what the kernel does not take is waited for to the last byte.
        raw.send(f"GET /big.txt HTTP/1.1\r\n{HEAD}Range: bytes=0-60000\r\n\r\n" * 60)
        await eventually(lambda: cut(running) == {"unread": 2})
        await eventually(lambda: open_connections(running) == 0)


# --- number -------------------------------------------------------------------------------------------------------


async def test_half_requests_lock_nobody_out(launch: Launch) -> None:
    """Guards against a thousand keyless bytes that stop a service: the oldest half makes room."""
    running = await launch(max_connections=20, api_key=KEY)
    async with AsyncExitStack() as stack:
        for i in range(100):
            raw = await stack.enter_async_context(connect(running))
            raw.send("" if i % 2 else f"POST /v1/responses HTTP/1.1\r\n{HEAD}X: ")
        await eventually(lambda: cut(running).get("evicted", 0) >= 80)
        assert open_connections(running) == 20
        assert (await ask(running, f"GET /health HTTP/1.1\r\n{HEAD}\r\n")).status == 200
        assert (await ask(running, post(headers=BEARER))).status == 200
        # A head whose body never comes is refused for its key, and is then worth no more than half a head.
        for _ in range(30):
            raw = await stack.enter_async_context(connect(running))
            raw.send(f"POST /v1/responses HTTP/1.1\r\n{HEAD}Content-Length: 9\r\n\r\n")
            assert (await raw.answer()).status == 401
        assert (await ask(running, post(headers=BEARER))).status == 200
    assert "limit" not in cut(running)


async def test_half_heads_take_only_so_much_memory(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against thousands of long heads that never end, all within the limit of one, and against refusing whoever
    comes next instead of whoever holds the most."""
    monkeypatch.setattr(connections, "MAX_HALF_HEADS", 10_000)
    running = await launch(api_key=KEY)
    heads = running.server._listener
    assert heads is not None
    async with AsyncExitStack() as stack:
        shorter, longest, newcomer, longer = [await stack.enter_async_context(connect(running)) for _ in range(4)]
        least = 0
        for raw, size in ((shorter, 3000), (longest, 4000), (newcomer, 2000)):
            raw.send(f"POST /v1/responses HTTP/1.1\r\n{HEAD}X: {'x' * size}")
            least += size
            await eventually(lambda least=least: heads.half_heads >= least)  # type: ignore[misc]
        newcomer.send("x" * 1000)
        answer = await longest.answer()
        assert (answer.status, answer.error["code"]) == (503, "overloaded")
        assert (await ask(running, post(headers=BEARER))).status == 200
        longer.send(f"POST /v1/responses HTTP/1.1\r\n{HEAD}X: {'x' * 5000}")
        assert (await longer.answer()).status == 503
        for raw in (shorter, newcomer):
            raw.send(f"\r\n{BEARER}Content-Length: 13\r\n\r\n" + '{"input":"x"}')
            assert (await raw.answer()).status == 200
    await eventually(lambda: heads.half_heads == 0)


@pytest.mark.parametrize(
    ("limits", "status", "code"),
    [
        ({"max_connections": 3}, 503, "overloaded"),
        ({"max_connections_per_address": 3}, 429, "rate_limit_exceeded"),
    ],
)
async def test_health_is_answered_at_the_limit(launch: Launch, limits: dict[str, int], status: int, code: str) -> None:
    """Guards against a supervisor that ends a service because it is busy, and against cutting those who work."""
    engine = FakeEngine()
    running = await launch(engine, **limits)
    engine.gate.clear()
    async with AsyncExitStack() as stack:
        working = [await stack.enter_async_context(connect(running)) for _ in range(3)]
        for raw in working:
            raw.send(post())
        await eventually(lambda: engine.live == 3)
        for path in ("/health", "/ready"):
            async with connect(running) as raw:
                raw.send(f"GET {path} HTTP/1.1\r\n{HEAD}\r\n")
                answer = await raw.answer()
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                assert await raw.rest() == b""
        answer = await ask(running, post())
        assert (answer.status, answer.error["code"]) == (status, code)
        assert int(answer.headers["retry-after"]) >= 1
        # Nor do those who came too late and say nothing keep the probes out.
        for _ in range(50):
            raw = await stack.enter_async_context(connect(running))
            raw.send("G")
        assert (await ask(running, f"GET /health HTTP/1.1\r\n{HEAD}\r\n")).status == 200
        engine.gate.set()
        assert [(await raw.answer()).status for raw in working] == [200, 200, 200]
        assert (await ask(running, post())).status == 200
    assert cut(running)["limit"] >= 53


async def test_the_reserve_keeps_its_short_time(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against probes' places that are held five times as long by whoever sends one byte."""
    monkeypatch.setattr(connections, "RESERVE_HEAD_TIMEOUT_S", 0.1)
    engine = FakeEngine()
    running = await launch(engine, max_connections=1)
    engine.gate.clear()
    async with connect(running) as working:
        working.send(post())
        await eventually(lambda: engine.live == 1)
        async with connect(running) as late:
            late.send("G")
            assert b"408" in await late.rest()
        engine.gate.set()
        assert (await working.answer()).status == 200


async def test_one_address_has_its_share_of_fewer_connections(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a limit for each address that is above all that the open files leave."""
    monkeypatch.setattr(listener, "connections_that_fit", lambda wanted, reserve: 4)
    engine = FakeEngine()
    running = await launch(engine, max_connections=4096, max_connections_per_address=2048)
    engine.gate.clear()
    async with connect(running) as first, connect(running) as second:
        for raw in (first, second):
            raw.send(post())
        await eventually(lambda: engine.live == 2)
        answer = await ask(running, post())
        assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
        engine.gate.set()
        assert [(await raw.answer()).status for raw in (first, second)] == [200, 200]


async def test_a_place_is_given_back_however_a_connection_ends(launch: Launch) -> None:
    """Guards against limits that fill up with connections that are no more."""
    running = await launch(max_connections=2, max_connections_per_address=2)
    for _ in range(10):
        async with connect(running) as raw:
            raw.send("GET ")
            raw.reset()
        async with running.socket() as socket:
            await socket.create()
            await socket.response()
        async with connect(running) as raw:
            raw.send(post())
            assert (await raw.answer()).status == 200
    await eventually(lambda: open_connections(running) == 0)
    assert "limit" not in cut(running)


# --- WebSockets ----------------------------------------------------------------------------------------------------


async def test_clients_that_go_while_upgrading_are_counted(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against errors and tracebacks for a browser tab that was closed."""
    running = await launch()
    metrics = running.server.service.metrics
    for _ in range(20):
        async with connect(running) as raw:
            raw.send(f"GET /v1/responses HTTP/1.1\r\n{HEAD}{UPGRADE}\r\n")
            raw.reset()
    await eventually(lambda: metrics.handshakes_aborted + metrics.sockets_total >= 20)
    await eventually(lambda: open_connections(running) == 0 and not running.server.sockets.open)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert 500 not in {status for _, _, status in metrics.http}


@pytest.mark.parametrize("lost", ["before", "while"])
async def test_an_aborted_handshake_has_no_traceback(
    launch: Launch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Guards against the same where the connection ends just before, or just as, the answer is written."""
    running = await launch()
    handle = running.server.sockets.handle

    async def late(request, client):
        request.protocol.transport.abort()
        if lost == "before":
            request.protocol.transport = None
        return await handle(request, client)

    monkeypatch.setattr(running.server.sockets, "handle", late)
    async with connect(running) as raw:
        raw.send(f"GET /v1/responses HTTP/1.1\r\n{HEAD}{UPGRADE}\r\n")
        await raw.rest()
    metrics = running.server.service.metrics
    await eventually(lambda: metrics.handshakes_aborted == 1)
    await eventually(lambda: open_connections(running) == 0)
    assert metrics.http == {("GET", "/v1/responses", 499): 1}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("wrong", "right", "status"),
    [
        ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 8", 426),
        ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 7", 426),
        ("Sec-WebSocket-Version: 13", "X: y", 426),
        ("Connection: Upgrade", "Connection: keep-alive", 400),
        ("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Key: SEKRET", 400),
        ("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "X: y", 400),
    ],
)
async def test_a_handshake_that_is_none(running: Running, wrong: str, right: str, status: int) -> None:
    """Guards against frames of other versions, and against answers that repeat what came."""
    assert wrong in UPGRADE
    answer = await ask(running, f"GET /v1/responses HTTP/1.1\r\n{HEAD}{UPGRADE.replace(wrong, right)}\r\n")
    assert answer.status == status
    assert "Sec-WebSocket" in answer.error["message"] or "Connection" in answer.error["message"]
    assert b"SEKRET" not in answer.body
    assert answer.headers.get("sec-websocket-version") == ("13" if status == 426 else None)


async def upgraded(raw: Raw, headers: str = "") -> str:
    raw.send(f"GET /v1/responses HTTP/1.1\r\n{HEAD}{UPGRADE}{headers}\r\n")
    answer = await raw.answer()
    assert answer.status == 101
    return answer.head


CREATE = b'{"type":"response.create","input":"hello"}'


@pytest.mark.parametrize(
    "pieces",
    [
        [frame(1, CREATE, masked=False)],
        [frame(9, b"", masked=False)],
        [frame(1, CREATE) + frame(1, CREATE, masked=False)],
        [frame(1, CREATE)[:20], frame(1, CREATE)[20:] + b"\x81", b"\x05hello"],
    ],
    ids=["text", "ping", "after a good one", "in pieces"],
)
async def test_a_frame_without_a_mask_closes(running: Running, pieces: list[bytes]) -> None:
    """Guards against clients that a proxy between could be made to misread; RFC 6455 says 1002."""
    async with connect(running) as raw:
        await upgraded(raw)
        for piece in pieces:
            raw.send(piece)
            await asyncio.sleep(0.01)
        assert await raw.close_code() == 1002


async def test_frames_may_come_in_any_pieces(running: Running) -> None:
    """Guards against a check of masks that loses its place: heads of all three lengths, byte by byte."""
    text = b'{"type":"response.create","input":"' + b"x" * 300 + b'"}'
    frames = (
        frame(9, b"ping")
        + struct.pack("!BBH", 0x81, 0x80 | 126, len(text))
        + bytes(4)
        + text
        + struct.pack("!BBQ", 0x81, 0x80 | 127, len(text))
        + bytes(4)
        + text
        + frame(8, struct.pack("!H", 1000))
    )
    for size in (1, 3, len(frames)):
        async with connect(running) as raw:
            await upgraded(raw)
            for at in range(0, len(frames), size):
                raw.send(frames[at : at + size])
                await asyncio.sleep(0)
            assert await raw.close_code() == 1000
    assert len(running.engine.submitted) in range(6 + 1)


@pytest.mark.parametrize(
    ("code", "answered"),
    [(c, 1002) for c in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)]
    + [(c, 1000) for c in (1000, 1001, 1011, 1012, 3000, 4999)],
)
async def test_close_codes_that_nobody_may_send(running: Running, code: int, answered: int) -> None:
    """Guards against taking reserved codes for a goodbye."""
    async with connect(running) as raw:
        await upgraded(raw)
        raw.send(frame(8, struct.pack("!H", code)))
        assert await raw.close_code() == answered
    await eventually(lambda: running.server.service.metrics.sockets_open == 0)
    closed = running.server.service.metrics.sockets_closed
    assert closed == {1002 if answered == 1002 else code: 1}


async def test_nothing_is_inflated(running: Running) -> None:
    """Guards against small frames that become large ones: compression is not agreed to, and a frame that says it is
    compressed breaks the protocol."""
    async with connect(running) as raw:
        head = await upgraded(raw, "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n")
        assert "extensions" not in head.lower()
        raw.send(b"\xc1" + frame(1, b"\x4b\x4c\x04\x00")[1:])
        assert await raw.close_code() == 1002


def send_then_read(port: int, data: bytes) -> bytes:
    """What a client sees that sends everything before it reads anything."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(f"GET /v1/responses HTTP/1.1\r\n{HEAD}{UPGRADE}\r\n".encode() + data)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (struct.pack("!BBQ", 0x81, 0x80 | 127, 8 << 20) + bytes(8 << 20), 1009),
        (frame(1, CREATE, masked=False) + frame(1, CREATE) * 200_000, 1002),
    ],
    ids=["too long", "no mask"],
)
async def test_who_breaks_a_rule_can_read_which(launch: Launch, data: bytes, code: int) -> None:
    """Guards against a reset that takes the close frame from a client that is still sending."""
    running = await launch(max_message_bytes=10_000)
    said = await asyncio.to_thread(send_then_read, running.server.port, data)
    assert struct.pack("!H", code) in said[-4:]
    await eventually(lambda: open_connections(running) == 0)


async def test_a_body_that_comes_with_its_head_is_no_head(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an ordinary request that is refused for the length of its head, since the loop had read its body
    before the task that waits for heads could run."""
    made: list[connections.Connection] = []
    admit = listener.Listener.admit
    monkeypatch.setattr(listener.Listener, "admit", lambda self, c, peer: (made.append(c), admit(self, c, peer))[1])
    running = await launch()
    request = post(json.dumps({"input": "x", "user": "y" * 4 * MAX_HEAD_BYTES}).encode())
    async with connect(running) as raw:
        await eventually(lambda: bool(made) and made[0]._waiter is not None)
        for start in range(0, len(request), 32_768):
            made[0].data_received(request[start : start + 32_768])
        assert (await raw.answer()).status == 200
        raw.send(post())
        assert (await raw.answer()).status == 200
