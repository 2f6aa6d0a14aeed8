"""The service's small parts: decoding, the conversation store, places, settings, histograms."""

from __future__ import annotations

import asyncio
import json
import random
import re
import struct
from collections import Counter
from contextlib import ExitStack, suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from dspark_stream.errors import (
    ConfigError,
    ContextLengthError,
    DrainingError,
    EngineFailedError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RateLimitError,
)
from dspark_stream.server import bodies
from dspark_stream.server.admission import Admission
from dspark_stream.server.bodies import (
    ChatBody,
    CompletionBody,
    ResponseBody,
    ResponseCancel,
    ResponseCreate,
    decode,
    decode_envelope,
    decode_event,
)
from dspark_stream.server.conversation import ConversationStore
from dspark_stream.server.exposition import Histogram, Page
from dspark_stream.server.frames import MOST_AT_ONCE, CrowdedTurns, FrameCheck
from dspark_stream.server.plan import Planner
from dspark_stream.server.service import STREAM_BYTES, TOKEN_BYTES
from dspark_stream.server.settings import ServerConfig
from dspark_stream.types import MAX_SEED, RANGES, Range
from fakes import model_info

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    sorted(
        {
            *ResponseCreate.__struct_fields__,
            *ChatBody.__struct_fields__,
            *CompletionBody.__struct_fields__,
            "type",
            "other",
        }
    )
)
TYPES = st.sampled_from(["response.create", "response.cancel", "dspark:resume"])
PLANNER = Planner(model_info())


def closed(info: Any, path: str = "") -> dict[str, list[Any]]:
    """Paths of the fields of a message that may have a few values only, and these."""
    found = {}
    for part in info.types if isinstance(info, inspect.UnionType) else [info]:
        if isinstance(part, inspect.LiteralType | inspect.EnumType):
            found[path[1:]] = part.values if isinstance(part, inspect.LiteralType) else [e.value for e in part.cls]
        elif isinstance(part, inspect.StructType):
            for field in part.fields:
                found |= closed(field.type, f"{path}.{field.encode_name}")
    return found


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody, ResponseBody, ResponseCreate, ResponseCancel])
def test_a_value_that_is_none_of_a_few_is_told_them(kind: type[Any]) -> None:
    """Guards against fields, those to come too, whose error does not say what is possible."""
    fields = closed(inspect.type_info(kind))
    assert bool(fields) == (kind is not ResponseCancel)
    for path, possible in fields.items():
        *outer, name = path.split(".")
        body: Any = {name: "foo"}
        for around in reversed(outer):
            body = {around: body}
        if kind.__struct_config__.tag is not None:
            body["type"] = kind.__struct_config__.tag
        with pytest.raises(InvalidRequestError, match=re.escape(f"`{path}` must be `")) as caught:
            decode(json.dumps(body), kind)
        assert all(f"`{value}`" in caught.value.message for value in possible)
        assert caught.value.message.endswith("but is `foo`")
        assert caught.value.param == path


@given(kind=TYPES, fields=st.dictionaries(FIELDS, JSON, max_size=5))
def test_whatever_is_sent_is_a_plan_or_a_typed_error(kind: str, fields: dict[str, Any]) -> None:
    """Guards against input that becomes an exception of ours instead of an error of theirs."""
    data = msgspec.msgpack.encode({"type": kind, **fields})
    with suppress(InvalidRequestError, NotFoundError):
        event = decode_event(data, "msgpack")
        if isinstance(event, ResponseCreate):
            PLANNER.response(event)
    decode_envelope(data, "msgpack")
    with suppress(InvalidRequestError, NotFoundError):
        PLANNER.chat(decode(json.dumps(fields), ChatBody))
    with suppress(InvalidRequestError, NotFoundError):
        PLANNER.completion(decode(json.dumps(fields), CompletionBody))


@given(data=st.binary(max_size=40), text=st.text(max_size=40))
def test_noise_is_a_typed_error(data: bytes, text: str) -> None:
    """Guards against bytes that a decoder answers with something else than its own error."""
    for encoding, noise in (("json", data), ("msgpack", data), ("json", text)):
        with pytest.raises(InvalidRequestError):
            decode_event(noise, encoding)  # type: ignore[arg-type]
        decode_envelope(noise, encoding)  # type: ignore[arg-type]


def test_an_error_repeats_only_so_much() -> None:
    """Guards against a megabyte of the client's own text that comes back as an error."""
    for data in (
        {"type": "x" * 100_000},
        {"type": "response.create", "y" * 100_000: 1},
        {"type": "response.create", "dspark": {"mode": "z" * 100_000}},
    ):
        with pytest.raises(InvalidRequestError) as caught:
            decode_event(json.dumps(data), "json")
        assert len(caught.value.message) < 1_000
        assert len(caught.value.param or "") < 1_000


def test_no_pattern_is_matched_against_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a field name that holds the loop for as long as a pattern takes over all of it."""
    real, lengths = bodies._AT, []

    class Recorded:
        def match(self, text: str) -> re.Match[str] | None:
            lengths.append(len(text))
            return real.match(text)

    monkeypatch.setattr(bodies, "_AT", Recorded())
    with pytest.raises(InvalidRequestError) as caught:
        decode(json.dumps({"messages": [], "dspark": {"z" * 1_000_000: 1}}), ChatBody)
    assert (caught.value.code, (caught.value.param or "")[:10]) == ("unknown_field", "dspark.zzz")
    assert max(lengths) < 3_000


def test_what_is_looked_at_one_by_one_is_bounded() -> None:
    """Guards against bodies of hundreds of thousands of small things, each of which costs the loop time."""
    planner = Planner(model_info(max_model_len=100))
    for many in ([{"role": "user", "content": [""] * 2049}], [{"role": "user", "content": ["a"] * 1025}] * 2):
        with pytest.raises(InvalidRequestError, match=r"(2049|2050) parts of messages; at most 2048") as caught:
            planner.chat(ChatBody(messages=many))
        assert caught.value.param == "messages"
        with pytest.raises(InvalidRequestError, match="at most 2048") as caught:
            planner.response(ResponseBody(input=many))
        assert caught.value.param == "input"
    planner.chat(ChatBody(messages=[{"role": "user", "content": [""]}] * 2047 + [{"role": "user", "content": ["a"]}]))
    with pytest.raises(InvalidRequestError, match="65 names; at most 64") as caught:
        planner.response(ResponseBody(input="x", include=["file_search_call.results"] * 65))
    assert caught.value.param == "include"
    planner.response(ResponseBody(input="x", include=["file_search_call.results"] * 64))
    # Not ids, and not looked at: they are too many.
    with pytest.raises(ContextLengthError, match="has 100 tokens, and the answer needs one") as caught:
        planner.completion(CompletionBody(prompt=[-1] * 100))
    assert caught.value.param == "prompt"
    planner.completion(CompletionBody(prompt=[1] * 99))


def test_room_and_limits() -> None:
    """Guards against an answer that is promised more tokens than the context has."""
    planner = Planner(model_info(max_model_len=100))
    plan = planner.response(decode_event('{"type":"response.create","input":"x"}', "json"))  # type: ignore[arg-type]
    assert planner.room(plan, 10, 1024) == 90
    assert planner.room(plan, 10, 50) == 50
    assert planner.room(plan, 99, 50) == 1
    with pytest.raises(ContextLengthError) as caught:
        planner.room(plan, 100, 50)
    assert caught.value.param == "input"
    text = '{"type":"response.create","input":"x","max_output_tokens":60}'
    plan = planner.response(decode_event(text, "json"))  # type: ignore[arg-type]
    assert planner.room(plan, 40, 1) == 60
    assert planner.room(plan, 41, 1) == 59  # cut, and said: `Plan.warnings`
    assert caught.value.message.startswith("This model's maximum context length is 100 tokens. ")


def test_the_size_check_never_refuses_what_could_fit() -> None:
    """Guards against a bound that is not one: a prompt of the longest tokens must still pass."""
    planner = Planner(model_info(max_model_len=100, max_token_bytes=4))
    planner.refuse_oversized([("user", "x" * 400)], "input")
    planner.refuse_oversized([("user", "é" * 200)], "input")
    for text in ("x" * 401, "é" * 201):
        with pytest.raises(ContextLengthError):
            planner.refuse_oversized([("user", text)], "input")


# --- the store ------------------------------------------------------------------------------------------------------


def test_the_store_forgets_the_least_recently_used() -> None:
    """Guards against a store that grows without bound, or forgets what is in use."""
    store = ConversationStore(2, 10_000)
    store.put("a", [("user", "1")])
    store.put("b", [("user", "2")])
    assert store.get("a") == (("user", "1"),)
    store.put("c", [("user", "3")])
    assert len(store) == 2
    assert store.get("a")
    with pytest.raises(NotFoundError) as caught:
        store.get("b")
    assert caught.value.param == "previous_response_id"
    assert store.get(None) == ()


def test_the_store_is_bounded_in_bytes() -> None:
    """Guards against a few huge conversations that fill the memory, and bytes that are never counted back."""
    store = ConversationStore(1000, 5_000)
    for number in range(50):
        store.put(str(number), [("user", "x" * 900)])
        assert store.bytes <= 5_000
    assert 1 <= len(store) <= 5
    store.put("huge", [("user", "x" * 6_000)])
    with pytest.raises(NotFoundError):
        store.get("huge")
    assert len(store) >= 1


# --- places ----------------------------------------------------------------------------------------------------------


def test_places_come_back_on_every_way_out() -> None:
    """Guards against a place that an error keeps for ever."""
    admission = Admission(capacity=2, per_client=2)
    with pytest.raises(ZeroDivisionError), admission.place("a"):
        _ = 1 / 0
    assert admission.in_flight == 0
    with admission.place("a"), admission.place("b"):
        with pytest.raises(OverloadedError) as full, admission.place("c"):
            pass
        assert full.value.status == 503
        assert full.value.retry_after_s >= 1
        assert admission.in_flight == 2
    admission.draining = True
    with pytest.raises(DrainingError), admission.place("a"):
        pass
    admission.failure = "it broke"
    with pytest.raises(EngineFailedError, match="it broke"), admission.place("a"):
        pass
    assert admission.in_flight == 0


def test_a_client_has_its_limit_and_no_more() -> None:
    admission = Admission(capacity=20, per_client=1)
    with admission.place("a"):
        with pytest.raises(RateLimitError) as limited, admission.place("a"):
            pass
        assert limited.value.status == 429
        assert 2 <= limited.value.retry_after_s <= 5  # spread, so that not all come back at once
        with admission.place("b"):
            pass


@pytest.mark.parametrize(("clients", "each"), [(1, 48), (2, 32), (3, 24), (5, 16), (11, 8)])
def test_places_are_shared_by_those_who_want_them(clients: int, each: int) -> None:
    """Guards against one client that has all places, and others that are told that the server is full."""
    admission = Admission(capacity=96)
    with ExitStack() as held:
        counts = Counter[str]()
        for _ in range(100):
            for client in map(str, range(clients)):
                with suppress(RateLimitError):
                    held.enter_context(admission.place(client))
                    counts[client] += 1
        assert set(counts.values()) == {each}
        assert admission.most_alone() == 48
        with admission.place("a newcomer"):
            pass
        with pytest.raises(RateLimitError, match=rf"{each} of the server's 96 places.*--max-streams-per-client"):
            held.enter_context(admission.place("0"))
    assert admission.in_flight == 0


def test_a_benchmark_from_one_address_is_not_refused() -> None:
    """Guards against errors in what others' benchmarks do by default: guidellm has 512 requests open, vLLM's 1,000."""
    config = ServerConfig()
    admission = Admission(32 + config.max_queue, config.max_streams_per_client, config.queue_memory)
    assert admission.most_alone() >= 1000
    assert min(config.max_connections, config.max_connections_per_address) >= 1000
    with ExitStack() as held:
        for _ in range(1000):
            held.enter_context(admission.place("bench"))
            held.enter_context(admission.holding("bench")).grow(STREAM_BYTES + 1024 * (TOKEN_BYTES + 5))
        held.enter_context(admission.place("another"))


def test_memory_is_shared_like_places() -> None:
    """Guards against one client whose waiting prompts fill the machine, or leave nothing for the prompts of others."""
    admission = Admission(capacity=96, memory=96 << 20)
    with ExitStack() as stack:
        hog, late = (stack.enter_context(admission.holding(client)) for client in ("hog", "late"))
        for _ in range(48):
            hog.grow(1 << 20)
        with pytest.raises(RateLimitError, match=r"take 48 of the server's 96 MiB.*what is left is for others"):
            hog.grow(1)
        assert admission.bytes_held == 48 << 20  # what was refused is not counted
        for _ in range(24):
            late.grow(1 << 20)
        with pytest.raises(RateLimitError):
            late.grow(1 << 20)
        with pytest.raises(OverloadedError, match="96 MiB"):
            stack.enter_context(admission.holding("another")).grow(25 << 20)
        stack.enter_context(admission.holding("another")).grow(12 << 20)
    assert admission.bytes_held == 0
    assert not admission._bytes
    alone = Admission(capacity=4, per_client=4, memory=96 << 20)  # no shares
    with alone.holding("a") as held:
        held.grow(96 << 20)
        with pytest.raises(OverloadedError):
            held.grow(1)


def test_the_last_places_and_bytes_are_for_those_who_have_none() -> None:
    """Guards against greedy clients that come one after the other, each of whom takes half of what is left: after the
    twelfth nothing was."""
    admission = Admission(capacity=2080, memory=512 << 20)
    counts = Counter[str]()
    with ExitStack() as stack:
        for client in map(str, range(20)):
            memory = stack.enter_context(admission.holding(client))
            with suppress(RateLimitError):
                while True:
                    stack.enter_context(admission.place(client))
                    counts[client] += 1
            with suppress(RateLimitError):
                while True:
                    memory.grow(STREAM_BYTES)
            assert memory.size >= 2 * STREAM_BYTES
        assert list(counts.values())[:7] == [1040, 520, 260, 130, 65, 33, 1]
        for client in ("a", "b"):
            stack.enter_context(admission.place(client))
            stack.enter_context(admission.holding(client)).grow(2 * STREAM_BYTES)
        with pytest.raises(RateLimitError, match="what is left is for others"):
            stack.enter_context(admission.place("a"))
    assert (admission.in_flight, admission.bytes_held) == (0, 0)


def test_a_client_that_was_there_first_gives_way() -> None:
    """Guards against shares that only count at the beginning: places that become free go to whoever has fewer."""
    admission = Admission(capacity=96)
    hogs = [ExitStack() for _ in range(48)]
    for hog in hogs:
        hog.enter_context(admission.place("hog"))
    with ExitStack() as held:
        for _ in range(24):
            held.enter_context(admission.place("late"))
        for hog in hogs[:16]:
            hog.close()
            with suppress(RateLimitError):
                hog.enter_context(admission.place("hog"))
            with suppress(RateLimitError):
                held.enter_context(admission.place("late"))
        assert (admission._clients["hog"], admission._clients["late"]) == (32, 32)
    for hog in hogs:
        hog.close()


def test_a_load_test_from_one_address_can_have_all_places() -> None:
    admission = Admission(capacity=5, per_client=5)
    assert admission.most_alone() == 5
    admission.limits = {"holder": 2}
    assert (admission.most_alone("holder"), admission.most_alone("a")) == (2, 5)
    with ExitStack() as held:
        for _ in range(5):
            held.enter_context(admission.place("a"))
        for client in "ab":
            with pytest.raises(OverloadedError):
                held.enter_context(admission.place(client))
    for capacity in (1, 2, 3):
        assert Admission(capacity).most_alone() == (capacity + 1) // 2
        with Admission(capacity).place("a"):
            pass


# --- settings and figures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_sockets": 0}, "max_sockets"),
        ({"max_lane_queue": -1}, "max_lane_queue"),
        ({"shutdown_timeout_s": -1.0}, "shutdown_timeout_s"),
        ({"allowed_origins": ("example.org",)}, "allowed_origins"),
        ({"allowed_origins": ("https://example.org/",)}, "allowed_origins"),
        ({"api_key": "ключ"}, "api_key"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], param: str) -> None:
    """Guards against a server that starts and then refuses everybody."""
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**changes)
    assert caught.value.param == param


def test_a_histogram_counts_cumulatively() -> None:
    """Guards against buckets that Prometheus cannot add up."""
    histogram = Histogram((0.1, 1.0))
    for value, times in ((0.05, 1), (0.1, 2), (0.5, 1), (7.0, 3)):
        histogram.observe(value, times)
    page = Page([("model_name", 'a"b')], open_metrics=False)
    page.histogram("x", "What.", histogram)
    assert page.text().splitlines() == [
        "# HELP x What.",
        "# TYPE x histogram",
        'x_bucket{model_name="a\\"b",le="0.1"} 3',
        'x_bucket{model_name="a\\"b",le="1.0"} 4',
        'x_bucket{model_name="a\\"b",le="+Inf"} 7',
        'x_sum{model_name="a\\"b"} 21.75',
        'x_count{model_name="a\\"b"} 7',
    ]


@pytest.mark.parametrize(
    ("body", "values"),
    [
        ({"input": 'f(a[0], b, {"c": "\\"", \'d\': [,,,]});\n' * 1000}, 1),
        ({"input": '",{[' * 10_000}, 1),
        ({"a": ['",{[' * 3] * 10_000}, 10_001),
        ({"a": [{"b": "\\", "c": [1, -2.5, 3]}] * 5_000}, 5_000 * 4 + 1),
        ({"prompt": [7, -1] * 20_000}, 2),
    ],
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" , ", " : ")])
def test_values_of_a_body_are_counted_and_what_texts_look_like_is_not(body, values, separators):
    """Guards against a text refused for the commas and brackets in it: what is counted is the values, to a hundredth;
    numbers that follow others are not."""
    data = json.dumps(body, separators=separators).encode()
    assert not bodies._has_more_values(data, "json", int(1.01 * values) + 2)
    if values > 2:
        assert bodies._has_more_values(data, "json", int(0.99 * values) - 2)


class OneReader:
    """A reader of frames, and the connection that they come from."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.taken: list[bytes] = []
        self.stalled = False
        self.held = False

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        if data:
            self.taken.append(data)
        return self.broken, b""

    def feed_eof(self) -> None: ...

    def hold_reading(self) -> None:
        self.held = True

    def release_reading(self) -> None:
        self.held = False


async def test_frames_are_taken_a_few_at_once_and_none_is_lost() -> None:
    """Guards against bytes that are lost or turned round between turns, whatever pieces they come in, and against
    frames taken while nobody takes what is decoded."""
    chance = random.Random(5)
    turns = CrowdedTurns()
    both = []
    for _ in range(2):
        frames = [bytes([0x81, 0x80 | n]) + bytes(4) + chance.randbytes(n) for n in chance.choices(range(126), k=900)]
        frames += [bytes([0x81, 0xFE]) + struct.pack("!H", n) + bytes(4 + n) for n in (126, 9000)]
        chance.shuffle(frames)
        reader, sent = OneReader(), b"".join(frames)
        check, at = FrameCheck(reader, reader, turns), 0  # type: ignore[arg-type]
        both.append((reader, check, sent))
        while at < len(sent):
            size = chance.choice((1, 7, 300, 30_000))
            check.feed_data(sent[at : at + size])
            at += size
            reader.stalled = chance.random() < 0.3
            for _ in range(chance.choice((0, 1, 9))):
                before = len(reader.taken)
                await asyncio.sleep(0)
                assert not (reader.stalled and len(reader.taken) > before)
            reader.stalled = False
            check.resume()
    for reader, _, sent in both:
        for _ in range(2 * 902 // MOST_AT_ONCE + 2):
            await asyncio.sleep(0)
        assert not reader.held
        assert b"".join(reader.taken) == sent
        assert len(reader.taken) > 900 // MOST_AT_ONCE


async def test_a_broken_rule_ends_a_crowd() -> None:
    """Guards against a connection that is never read again, and so is never seen to end."""
    reader = OneReader(broken=True)
    check = FrameCheck(reader, reader, CrowdedTurns())  # type: ignore[arg-type]
    assert check.feed_data((bytes([0x81, 0x80]) + bytes(4)) * (MOST_AT_ONCE + 1))[0]
    for _ in range(3):
        await asyncio.sleep(0)
    assert not reader.held
    assert len(reader.taken) == 1


def test_the_bound_that_an_error_names_is_allowed() -> None:
    """Guards against a seed that is refused, and is what the error says a seed may be."""
    assert str(RANGES["seed"]) == f"from 0 to {MAX_SEED}"
    assert str(Range(0.25, 2e6, low_open=True)) == "above 0.25 to 2000000"
