"""Every kind of bad input: a typed error that names the field, and a socket that still works."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from dspark_stream.server import bodies
from dspark_stream.server.frames import MOST_AT_ONCE, FrameCheck
from fakes import FakeEngine, model_info
from wire.harness import Launch, Running, eventually
from wire.raw import UPGRADE, Raw, connect, frame

CREATE: dict[str, Any] = {"type": "response.create", "input": "hello"}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    # what is sent beside {"type": "response.create", "input": "hello"}, the field named, what the message says
    ({"type": "response.make"}, "type", "response.make"),
    ({"type": "dspark:resume", "response_id": "r", "starting_after": 0}, "type", "dspark:resume"),
    ({"type": None}, "type", "type"),
    ({"colour": "blue"}, "colour", "not a known field"),
    ({"dspark": {"speed": 11}}, "dspark.speed", "not a known field"),
    ({"dspark": {"temperature": 1}}, "dspark.temperature", "here it is `temperature`, at the top of the body"),
    ({"max_tokens": 5}, "max_tokens", "not a known field; here it is `max_output_tokens`"),
    ({"messages": []}, "messages", "not a known field; here it is `input`"),
    ({"steps": True}, "steps", "not a known field; here it is `dspark.steps`"),
    ({"temperature": "hot"}, "temperature", "float"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2"),
    ({"temperature": 2.5}, "temperature", "from 0 to 2"),
    ({"top_p": -0.1}, "top_p", "from 0 to 1"),
    ({"top_p": 1.01}, "top_p", "from 0 to 1"),
    ({"frequency_penalty": 2.1}, "frequency_penalty", "from -2 to 2"),
    ({"presence_penalty": -2.1}, "presence_penalty", "from -2 to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0 to 2"),
    ({"logit_bias": {"7": 101}}, "logit_bias.7", "from -100 to 100"),
    ({"logit_bias": {"1000": 1}}, "logit_bias", "from 0 to 999"),
    ({"logit_bias": {"the": 1}}, "logit_bias", "from 0 to 999"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "from 0 to 999"),
    ({"logit_bias": {"7": 1, "07": 2}}, "logit_bias", "each once"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "from 0 to 999"),
    ({"logit_bias": {f"{i}": 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
    ({"logit_bias": [1]}, "logit_bias", "object"),
    ({"min_tokens": -1}, "min_tokens", "at least 0"),
    ({"min_tokens": 9, "max_output_tokens": 8}, "min_tokens", "at most `max_output_tokens`, 8"),
    ({"stop_token_ids": [1000]}, "stop_token_ids[0]", "from 0 to 999"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids", "at most 64"),
    ({"input": ""}, "input", "empty"),
    ({"input": []}, "input", "empty"),
    ({"input": [{"role": "user", "content": ""}]}, "input", "empty"),
    ({"input": None}, "input", "required"),
    ({"input": 5}, "input", "int"),
    ({"input": ["x"]}, "input[0]", "object"),
    ({"input": [{"role": "user"}]}, "input[0].content", "required"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "robot"),
    ({"input": [{"role": "user", "content": None}]}, "input[0].content", "required"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "array"),
    ({"input": [{"role": "user", "content": [5]}]}, "input[0].content[0]", "object"),
    ({"input": [{"content": "x"}]}, "input[0].role", "required"),
    ({"input": [{"role": {"deep": deep(900)}, "content": "x"}]}, "input[0].role", "object"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "previous_response_id"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input", "empty"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].type", "function_call_output"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
        "only text",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]},
        "input[0].content[0].text",
        "str",
    ),
    ({"max_output_tokens": 0}, "max_output_tokens", "at least 1, or -1"),
    ({"max_output_tokens": -2}, "max_output_tokens", "at least 1, or -1"),
    ({"max_output_tokens": 2.5}, "max_output_tokens", "int"),
    ({"model": "gpt-17"}, "model", "gpt-17"),
    ({"previous_response_id": "resp_never"}, "previous_response_id", "resp_never"),
    ({"metadata": {"a": 1}}, "metadata", "str"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
    ({"metadata": {"k" * 65: "x"}}, "metadata", "64"),
    ({"dspark": {"mode": "fast"}}, "dspark.mode", "`dspark.mode` must be `dspark` or `plain`, but is `fast`"),
    ({"dspark": {"mode": 1}}, "dspark.mode", "must be `dspark` or `plain`: Expected `str | null`, got `int`"),
    ({"dspark": {"verification": "none"}}, "dspark.verification", "must be `rejection` or `coupled`, but is `none`"),
    ({"dspark": {"seed": -(2**63) - 1}}, "dspark.seed", "64-bit"),
    ({"seed": 2**64}, "seed", "64-bit"),
    ({"dspark": {"top_k": -2}}, "dspark.top_k", "1000"),
    ({"dspark": {"top_k": 1001}}, "dspark.top_k", "1000"),
    ({"dspark": {"min_p": 1.5}}, "dspark.min_p", "from 0 to 1"),
    ({"dspark": {"max_chunk_gap_ms": -1}}, "dspark.max_chunk_gap_ms", "from 0 to 600000"),
    ({"dspark": {"stop": ["a", "b", "c", "d", "e"]}}, "dspark.stop", "at most 4"),
    ({"dspark": {"stop": ["a", ""]}}, "dspark.stop[1]", "1 to 256"),
    ({"dspark": {"stop": "s" * 257}}, "dspark.stop", "1 to 256"),
    ({"dspark": {"steps": "yes"}}, "dspark.steps", "bool"),
    ({"stream_id": ""}, "stream_id", "1 to 128"),
    ({"event_id": "e" * 129}, "event_id", "1 to 128"),
    ({"tools": [{"type": "web_search"}]}, "tools", "not supported"),
    ({"text": {"format": {"type": "json_schema"}}}, "text", "not supported"),
    ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
    ({"truncation": "auto"}, "truncation", "not supported"),
    ({"background": True}, "background", "not supported"),
    ({"top_logprobs": 3}, "top_logprobs", "not supported"),
    ({"include": ["message.output_text.logprobs"]}, "include", "probabilities"),
    ({"n": 2}, "n", "one answer"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "not padded"),
    ({"tools": deep(900)}, "tools", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD_FIELDS, ids=lambda v: str(v)[:50])
async def test_a_bad_field_is_named_and_the_socket_goes_on(
    running: Running, fields: dict[str, Any], param: str, says: str
) -> None:
    """Guards against errors that do not say which field, and against bad events that cost the socket."""
    async with running.socket() as socket:
        await socket.send({"event_id": "e1", **CREATE, **fields})
        error = await socket.receive()
        assert error["type"] == "error"
        assert error["error"]["param"] == param
        assert says in error["error"]["message"]
        assert error["error"]["type"] == "invalid_request_error"
        assert error["status"] in (400, 404)
        assert error["sequence_number"] == 0
        assert error["event_id"] == fields.get("event_id", "e1")[:128]
        assert error["error"]["code"]
        await socket.create()
        assert (await socket.response())[-1]["type"] == "response.completed"


HARMLESS: list[dict[str, Any]] = [
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"truncation": "disabled", "background": False, "include": [], "top_logprobs": 0},
    {"text": {"format": {"type": "text"}}, "reasoning": {"effort": None}, "service_tier": "auto"},
    {"stream": True, "store": True, "user": "u", "metadata": None, "stream_options": None},
    {"prompt_cache_key": "k", "safety_identifier": "s", "generate": True, "model": "fake-135m"},
    {"temperature": 0, "top_p": 1, "dspark": {"seed": 5}},
    {"dspark": {}},
    {"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
]


@pytest.mark.parametrize("fields", HARMLESS, ids=lambda v: str(v)[:50])
async def test_harmless_fields_of_other_clients_pass(running: Running, fields: dict[str, Any]) -> None:
    """Guards against refusing clients for fields that ask for nothing."""
    async with running.socket() as socket:
        await socket.create(**fields)
        assert (await socket.response())[-1]["type"] == "response.completed"


MALFORMED: list[str] = [
    "{not json",
    "",
    '{"type": "response.create", "input": "x", "temperature": NaN}',
    '{"type": "response.create", "input": "x", "temperature": Infinity}',
    '{"type": "response.create", "input": "\\ud800"}',
    '{"type": "response.create"} trailing',
    "[" * 100_000,
    '{"tools":' + "[" * 100_000,
]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda v: v[:40])
async def test_malformed_json_is_an_error_and_the_socket_goes_on(running: Running, text: str) -> None:
    """Guards against a parser's exception that ends the connection."""
    async with running.socket() as socket:
        await socket.connection.send(text)
        error = await socket.receive()
        assert (error["type"], error["status"]) == ("error", 400)
        assert error["error"]["type"] == "invalid_request_error"
        await socket.create()
        assert (await socket.response())[-1]["type"] == "response.completed"


@pytest.mark.parametrize("text", ["[]", "5", '"x"', "null"])
async def test_json_that_is_no_object(running: Running, text: str) -> None:
    """Guards against an error that blames a field of something that has none."""
    async with running.socket() as socket:
        await socket.connection.send(text)
        error = await socket.receive()
        assert error["error"]["param"] is None
        assert "object" in error["error"]["message"]


async def test_nan_in_msgpack_is_an_error(launch: Launch) -> None:
    """Guards against NaN where JSON cannot carry it but MessagePack can."""
    running = await launch()
    async with running.socket(subprotocols=["dspark.v1+msgpack"]) as socket:
        for name in ("temperature", "top_p"):
            await socket.create(**{name: math.nan})
            assert (await socket.receive())["error"]["param"] == name
        await socket.create(dspark={"min_p": math.inf})
        assert (await socket.receive())["error"]["param"] == "dspark.min_p"
        for garbage in (b"\xc1", b"", b"\x91" * 50_000, b"\x81\xa4type\xa1\xff"):
            await socket.connection.send(garbage)
            assert (await socket.receive())["status"] == 400
        await socket.create()
        assert (await socket.response())[-1]["type"] == "response.completed"


async def test_the_wrong_kind_of_frame_is_an_error(running: Running) -> None:
    """Guards against a binary frame on a JSON socket, or text on a MessagePack one, that costs the connection."""
    async with running.socket() as socket:
        await socket.connection.send(msgspec.msgpack.encode(CREATE))
        error = await socket.receive()
        assert error["error"]["code"] == "wrong_frame_type"
        await socket.create()
        assert (await socket.response())[-1]["type"] == "response.completed"
    async with running.socket(subprotocols=["dspark.v1+msgpack"]) as socket:
        await socket.connection.send(json.dumps(CREATE))
        assert (await socket.receive())["error"]["code"] == "wrong_frame_type"
        await socket.create()
        assert (await socket.response())[-1]["type"] == "response.completed"


async def test_a_huge_prompt_is_refused_before_it_is_tokenised(running: Running) -> None:
    """Guards against paying for the tokens of a prompt that can never fit (its bytes already say so)."""
    async with running.socket() as socket:
        await socket.create(input="x" * 500_000)
        error = await socket.receive()
        assert error["error"]["param"] == "input"
        assert error["error"]["code"] == "context_length_exceeded"
        assert not running.tokenizer.chats
        await socket.create(input="é" * 2_050)  # few enough bytes to be tried, too many tokens
        error = await socket.receive()
        assert (error["error"]["param"], error["error"]["code"]) == ("input", "context_length_exceeded")
        assert len(running.tokenizer.chats) == 1
        await socket.create()
        assert (await socket.response())[-1]["type"] == "response.completed"


async def test_a_long_conversation_is_refused_before_it_is_tokenised(launch: Launch) -> None:
    """Guards against the same through turns that fit one by one."""
    running = await launch()
    async with running.socket() as socket:
        await socket.create(input="x" * 1500)
        first = (await socket.response())[-1]["response"]["id"]
        await socket.create(input="y" * 1500, previous_response_id=first)
        error = await socket.receive()
        assert (error["error"]["param"], error["error"]["code"]) == ("input", "context_length_exceeded")


async def test_a_failing_tokenizer_does_not_show_its_insides(running: Running) -> None:
    """Guards against stack traces and paths in answers, and against places that such a failure keeps."""
    running.tokenizer.error = RuntimeError("/secret/path: template exploded")
    async with running.socket() as socket:
        await socket.create(event_id="e")
        error = await socket.receive()
        assert (error["status"], error["event_id"]) == (500, "e")
        assert "secret" not in json.dumps(error)
        running.tokenizer.error = None
        await socket.create()
        assert (await socket.response())[-1]["type"] == "response.completed"


# --- frames that break the protocol of WebSockets itself ---------------------------------------------------------


def masked(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """A client's frame, with a mask of zeros."""
    first = (0x80 if final else 0) | opcode
    size = len(payload)
    head = struct.pack("!BB", first, 0x80 | size) if size < 126 else struct.pack("!BBH", first, 0x80 | 126, size)
    return head + b"\0\0\0\0" + payload


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (masked(1, b"\xff\xfe"), 1007),
        (masked(3, b"x"), 1002),
        (b"\xf1" + masked(1, b"x")[1:], 1002),
        (masked(9, b"p" * 200), 1002),
    ],
    ids=["not-utf8", "unknown-opcode", "reserved-bits", "long-ping"],
)
async def test_a_malformed_frame_closes(running: Running, frame: bytes, code: int) -> None:
    """Guards against going on after the stream of frames can no longer be trusted."""
    async with running.socket() as socket:
        socket.connection.transport.write(frame)
        assert await socket.closed() == code


async def test_an_oversized_message_closes(launch: Launch) -> None:
    """Guards against messages that fill the memory before anybody looks at them."""
    running = await launch(max_message_bytes=10_000)
    async with running.socket() as socket:
        await socket.create(input="x" * 9_000)
        assert (await socket.receive())["type"] == "error"  # too many tokens, but not too many bytes
        event = b'{"type":"x","a":"%s"}'
        for size in (10_000, 10_001):
            await socket.connection.send((event % (b"a" * (size - len(event) + 2))).decode())
            if size == 10_000:
                assert (await socket.receive())["type"] == "error"
        assert await socket.closed() == 1009
    await eventually(lambda: running.server.service.metrics.sockets_open == 0)


async def test_a_flood_of_bad_events_is_answered_in_step(launch: Launch) -> None:
    """Guards against a client that sends and does not read, and so piles up our answers."""
    running = await launch(pending_limit_bytes=4_000, slow_reader_timeout_s=30.0)
    async with running.socket(max_queue=1) as socket:
        sent = asyncio.create_task(_flood(socket.connection, 20_000))
        await asyncio.sleep(0.3)
        (shell,) = running.server.sockets.open
        assert shell.pending_bytes < 20_000
        for _ in range(20_000):
            assert (await socket.receive())["type"] == "error"
        await sent


async def _flood(connection: Any, count: int) -> None:
    for _ in range(count):
        await connection.send("{}")


CROWDS = {
    "pings": [frame(9, b"x")] * 20_000,
    "pongs": [frame(10, b"")] * 20_000,
    "texts": [frame(1, b"{}")] * 4000,
    "fragments": [bytes([1, 0x81]) + bytes(4) + b"{", *[bytes([0, 0x81]) + bytes(4) + b" "] * 20_000, frame(0, b"}")],
}


@pytest.mark.parametrize("kind", CROWDS)
async def test_crowds_of_frames_hold_up_nobody(monkeypatch: pytest.MonkeyPatch, running: Running, kind: str) -> None:
    """Guards against a quarter of a megabyte of the smallest frames, which the loop took in one go, for half a second:
    whatever is sent, everybody else comes in between, and it is answered frame by frame."""
    taken, turns = [0], [0]
    """Bytes, and turns of crowds, in each round of the loop."""
    pass_on, go_on = FrameCheck._pass_on, FrameCheck.go_on

    def counted(check: FrameCheck, data: bytes) -> tuple[bool, bytes]:
        taken[-1] += len(data)
        return pass_on(check, data)

    def counted_turn(check: FrameCheck) -> None:
        turns[-1] += 1
        go_on(check)

    monkeypatch.setattr(FrameCheck, "_pass_on", counted)
    monkeypatch.setattr(FrameCheck, "go_on", counted_turn)
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(connect(running)) for _ in range(4)]
        for raw in sockets:
            raw.send(f"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}\r\n")
            await raw.reader.readuntil(b"\r\n\r\n")
        read = [asyncio.create_task(_until(raw, b"is the last")) for raw in sockets]
        last = b'{"type":"response.create","input":"x","max_output_tokens":1,"metadata":{"it":"is the last"}}'
        for raw in sockets:
            raw.send(b"".join(CROWDS[kind]) + frame(1, last))
        while not all(task.done() for task in read):
            await asyncio.sleep(0)
            taken.append(0)
            turns.append(0)
        for said in await asyncio.gather(*read):
            assert said.count(frame(10, b"x", masked=False)) == (20_000 if kind == "pings" else 0)
            errors = {"texts": 4000, "fragments": 1}.get(kind, 0)
            assert said.count(b'"type":"error"') == errors
    # What each of the sockets begins with, and one turn.
    size = max(map(len, CROWDS[kind]))
    assert max(taken) <= (len(sockets) + 1) * MOST_AT_ONCE * size + len(sockets) * len(frame(1, last))
    assert max(turns) == 1
    assert sum(taken) == len(sockets) * len(b"".join(CROWDS[kind]) + frame(1, last))


async def _until(raw: Raw, end: bytes) -> bytes:
    said = bytearray()
    while end not in said[-100_000:]:
        more = await raw.reader.read(65_536)
        assert more
        said += more
    return bytes(said)


FLOODS: list[tuple[str, Any, str]] = [
    ("input", [{"": 0}] * 60_000, "json"),
    ("input", [{}] * 60_000, "json"),
    ("tools", [{"a": []}] * 60_000, "json"),
    ("user", ["a,b"] * 60_000, "json"),
    ("user", ['"[\\'] * 60_000, "json"),
    ("user", [{}] * 60_000, "msgpack"),
]


@pytest.mark.parametrize(("field", "value", "encoding"), FLOODS, ids=str)
async def test_a_flood_of_small_values_is_refused_unread(
    monkeypatch: pytest.MonkeyPatch, running: Running, field: str, value: Any, encoding: str
) -> None:
    """Guards against a message that holds everybody up while it becomes objects: it is never decoded."""
    read: list[int] = []
    made = bodies._decoder

    class Watching:
        def __init__(self, decoder: Any) -> None:
            self._decoder = decoder

        def decode(self, data: str | bytes) -> Any:
            read.append(len(data))
            return self._decoder.decode(data)

    monkeypatch.setattr(bodies, "_decoder", lambda *kind: Watching(made(*kind)))
    async with running.socket(subprotocols=["dspark.v1+msgpack"] if encoding == "msgpack" else None) as socket:
        await socket.create(**{field: value})
        error = await socket.receive()
        assert (error["status"], error["error"]["code"]) == (400, "too_many_values")
        assert not read
        await socket.create()
        assert (await socket.response())[-1]["type"] == "response.completed"
        assert max(read) < 1000
    if encoding == "json":
        async with running.http() as http, http.post("/v1/responses", json={"input": "x", field: value}) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["code"] == "too_many_values"


async def test_long_texts_are_no_floods(launch: Launch) -> None:
    """Guards against a text that is refused for the commas and brackets in it, and a prompt of ids for its length."""
    running = await launch(FakeEngine(info=model_info(max_model_len=300_000)))
    code = 'f(a[0], b, {"c": "\\"", \'d\': [,,,]});\n' * 5_000
    chat = [{"role": "user", "content": [{"type": "text", "text": '[,,{"'}] * 20}] * 100
    async with running.http() as http:
        for path, body in (
            ("/v1/responses", {"input": code}),
            ("/v1/responses", {"input": '",{[' * 40_000}),
            ("/v1/responses", {"input": "漢字仮名交" * 15_000}),
            ("/v1/chat/completions", {"messages": chat}),
            ("/v1/completions", {"prompt": [7] * 200_000}),
        ):
            async with http.post(path, json=body) as answer:
                assert answer.status == 200, await answer.text()
    async with running.socket(subprotocols=["dspark.v1+msgpack"]) as socket:
        await socket.create(input="漢字仮名交" * 15_000)
        assert (await socket.response())[-1]["type"] == "response.completed"
