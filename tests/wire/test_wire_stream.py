"""The main path over a WebSocket: create, deltas, one end; steps, encodings, lanes, cancelling, turns."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fakes import FakeEngine, Script, model_info
from wire.harness import TERMINAL, Event, Launch, Running, check_response, eventually, text_of

WORDS = "".join(f"w{i} " for i in range(10))


async def test_a_response_streams_and_completes(running: Running) -> None:
    """Guards against a wrong order of events, gaps in their numbers, or an answer that is not the deltas' sum."""
    async with running.socket() as socket:
        assert socket.hello["type"] == "dspark:hello"
        assert socket.hello["protocol"] == "dspark.v1+json"
        assert socket.hello["limits"]["max_model_len"] == 2048
        await socket.create(instructions="be brief", metadata={"a": "b"}, dspark={"seed": 7})
        events = await socket.response()
    types = [event["type"] for event in events]
    deltas = types.count("response.output_text.delta")
    assert deltas == 5  # one for each round
    assert types == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert text_of(events) == WORDS
    response = events[-1]["response"]
    assert (response["object"], response["status"]) == ("response", "completed")
    assert response["output"][0]["content"][0]["text"] == WORDS
    assert response["output"][0]["status"] == "completed"
    assert response["metadata"] == {"a": "b"}
    assert response["usage"]["output_tokens"] == 10
    assert response["dspark"]["seed"] == 7
    assert response["dspark"]["rounds"] == 5
    assert running.tokenizer.chats == [[("system", "be brief"), ("user", "hello")]]
    assert running.engine.submitted[0].sampling.max_tokens == 1024
    assert not any("stream_id" in event for event in events)


async def test_the_limit_makes_a_response_incomplete(running: Running) -> None:
    """Guards against a cut answer that says it is whole."""
    async with running.socket() as socket:
        await socket.create(max_output_tokens=4)
        events = await socket.response()
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert text_of(events) == "w0 w1 w2 w3 "


async def test_an_engine_failure_is_the_responses_own_end(launch: Launch) -> None:
    """Guards against a failed stream without an end, or one that takes the socket with it."""
    running = await launch(FakeEngine(lambda request: Script(fail_after_rounds=1 if request.mode == "plain" else None)))
    async with running.socket() as socket:
        await socket.create(dspark={"mode": "plain"})
        events = await socket.response()
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"]["code"] == "server_error"
        assert events[-1]["response"]["error"]["message"] == "the engine failed on purpose"
        assert text_of(events) == "w0 w1 w2 "
        await socket.create()
        assert (await socket.response())[-1]["type"] == "response.completed"


async def test_an_empty_answer_still_has_its_item(launch: Launch) -> None:
    """Guards against a completed response without a message, which clients index blindly."""
    running = await launch(Script(tokens=()))
    async with running.socket() as socket:
        await socket.create()
        events = await socket.response()
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


async def test_held_back_text_is_not_an_empty_delta(launch: Launch) -> None:
    """Guards against deltas of no text for rounds that only committed half a character."""
    running = await launch(Script(tokens=("", "", "é", "a"), rounds=(1,)))
    async with running.socket() as socket:
        await socket.create()
        events = await socket.response()
    assert [e["delta"] for e in events if e["type"] == "response.output_text.delta"] == ["é", "a"]


async def test_steps_only_where_asked_for_and_unnumbered(running: Running) -> None:
    """Guards against round sizes leaking by default, and against gaps for clients that skip extension events."""
    async with running.socket() as socket:
        await socket.create()
        assert not [e for e in await socket.response() if e["type"] == "dspark:step"]
        await socket.create(dspark={"steps": True}, stream_id="a")
        events = await socket.response()
    steps = [event for event in events if event["type"] == "dspark:step"]
    assert len(steps) == 5
    assert "".join(step["text"] for step in steps) == WORDS
    assert steps[0]["pieces"] == [["w0 ", True], ["w1 ", True], ["w2 ", False]]
    assert steps[0]["response_id"] == events[0]["response"]["id"]
    assert (steps[0]["drafted"], steps[0]["scheduled"], steps[0]["accepted"]) == (4, 4, 2)
    assert len(steps[0]["confidence"]) == len(steps[0]["survival"]) == 4
    assert {"bonus", "t_draft_ms", "t_verify_ms", "batch_tokens", "streams"} <= steps[0].keys()
    assert steps[0]["stream_id"] == "a"
    assert not any("sequence_number" in step for step in steps)


async def test_msgpack_carries_the_same_events(running: Running) -> None:
    """Guards against an encoding that says something else than the other."""
    async with running.socket() as socket:
        await socket.create(dspark={"seed": 1, "steps": True})
        plain = await socket.response()
    async with running.socket(subprotocols=["dspark.v1+msgpack"]) as socket:
        assert socket.connection.subprotocol == "dspark.v1+msgpack"
        assert socket.hello["protocol"] == "dspark.v1+msgpack"
        await socket.create(dspark={"seed": 1, "steps": True})
        packed = await socket.response()
    assert [shape(event) for event in packed] == [shape(event) for event in plain]
    assert text_of(packed) == text_of(plain)


def shape(value: Any) -> Any:
    """A value's structure, without what differs from response to response."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items() if key != "streams"}
    return [shape(item) for item in value] if isinstance(value, list) else type(value)


async def test_sampling_reaches_the_engine(running: Running) -> None:
    """Guards against a parameter that is accepted and then lost on the way."""
    async with running.socket() as socket:
        await socket.create(
            temperature=0.5,
            top_p=0.9,
            max_output_tokens=5,
            dspark={
                "mode": "plain",
                "verification": "coupled",
                "seed": 2**63 - 1,
                "top_k": 40,
                "min_p": 0.1,
                "stop": ["END", "\n\n"],
                "ignore_eos": True,
                "max_chunk_gap_ms": 80,
            },
        )
        await socket.response()
    request = running.engine.submitted[0]
    assert (request.mode, request.verification, request.record_rounds) == ("plain", "coupled", False)
    assert request.max_chunk_gap_ms == 80
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.seed, sampling.max_tokens) == (2**63 - 1, 5)
    assert (sampling.stop, sampling.ignore_eos) == (("END", "\n\n"), True)


async def test_input_items_become_messages(running: Running) -> None:
    """Guards against items, parts or roles that are dropped or reordered."""
    items = [
        {"role": "developer", "content": "rules"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "b", "annotations": []}],
        },
        {"role": "user", "content": [{"type": "input_text", "text": "c"}, {"type": "text", "text": "d"}]},
    ]
    async with running.socket() as socket:
        await socket.create(input=items)
        await socket.response()
    assert running.tokenizer.chats == [[("system", "rules"), ("user", "a"), ("assistant", "b"), ("user", ("c", "d"))]]


async def test_a_turn_continues_a_stored_one(running: Running) -> None:
    """Guards against lost turns, inherited instructions, and answers that others can go on with although ``store`` was
    false: the same socket can, as with OpenAI's."""
    async with running.socket() as socket:
        await socket.create(input="one", instructions="first only")
        first = (await socket.response())[-1]["response"]["id"]
        await socket.create(input="two", previous_response_id=first, store=False)
        events = await socket.response()
        assert events[-1]["response"]["previous_response_id"] == first
        second = events[-1]["response"]["id"]
        await socket.create(input="three", previous_response_id=second, max_output_tokens=1)
        await socket.response()
        async with running.socket() as other, running.http() as http:
            await other.create(input="three", previous_response_id=second, event_id="e3")
            error = await other.receive()
            body = {"input": "three", "previous_response_id": second}
            async with http.post("/v1/responses", json=body) as answer:
                assert answer.status == 404
        assert (error["type"], error["event_id"]) == ("error", "e3")
        assert error["error"]["param"] == "previous_response_id"
        kept = len(running.server.service.store)
    turns = [("user", "one"), ("assistant", WORDS), ("user", "two")]
    assert running.tokenizer.chats[1:] == [turns, [*turns, ("assistant", WORDS), ("user", "three")]]
    await eventually(lambda: len(running.server.service.store) == kept - 1)  # the socket's own goes with it


# --- lanes ------------------------------------------------------------------------------------------------------


async def test_lanes_run_side_by_side_and_each_in_order(launch: Launch) -> None:
    """Guards against one lane waiting for another, a lane out of order, or an event without its lane's name."""
    running = await launch(FakeEngine(Script(tokens=["x"] * 40, rounds=(1,)), step_s=0.002))
    async with running.socket() as socket:
        for lane in ("a", "b"):
            for number in (1, 2):
                await socket.create(stream_id=lane, metadata={"n": f"{lane}{number}"})
        by_lane: dict[str, list[Event]] = {"a": [], "b": []}
        order: list[str] = []
        while sum(event["type"] in TERMINAL for events in by_lane.values() for event in events) < 4:
            event = await socket.receive()
            by_lane[event["stream_id"]].append(event)
            order.append(event["stream_id"])
    for lane, events in by_lane.items():
        ends = [i for i, event in enumerate(events) if event["type"] in TERMINAL]
        check_response(events[: ends[0] + 1])
        check_response(events[ends[0] + 1 :])
        created = [e["response"]["metadata"]["n"] for e in events if e["type"] == "response.created"]
        assert created == [f"{lane}1", f"{lane}2"]
    assert "a" in order[order.index("b") : len(order) // 2]


async def test_a_full_lane_refuses_by_name_and_goes_on(launch: Launch) -> None:
    """Guards against a lane that queues without bound, or forgets what waits in it when it refuses."""
    running = await launch(FakeEngine(), max_lane_queue=2)
    running.engine.gate.clear()
    async with running.socket() as socket:
        for number in range(4):
            await socket.create(stream_id="a", event_id=f"e{number}")
        events = await socket.until("error")
        assert events[-1]["status"] == 429
        assert events[-1]["error"]["param"] == "stream_id"
        assert events[-1]["event_id"] == "e3"
        assert events[-1]["stream_id"] == "a"
        running.engine.gate.set()
        ends = [e for _ in range(3) for e in await socket.until(*TERMINAL) if e["type"] in TERMINAL]
    assert [event["type"] for event in ends] == ["response.completed"] * 3


async def test_a_socket_has_so_many_lanes(launch: Launch) -> None:
    """Guards against a socket that opens lanes without bound."""
    running = await launch(FakeEngine(), max_lanes=2)
    running.engine.gate.clear()
    async with running.socket() as socket:
        for lane in "abc":
            await socket.create(stream_id=lane)
        error = (await socket.until("error"))[-1]
        assert (error["status"], error["stream_id"]) == (429, "c")


async def test_a_place_is_free_for_the_next_in_the_lane(launch: Launch) -> None:
    """Guards against a lane whose second response finds its own lane's first still holding the only place."""
    engine = FakeEngine(info=model_info(max_num_seqs=1))
    running = await launch(engine, max_queue=0)
    async with running.socket() as socket:
        for _ in range(3):
            await socket.create(stream_id="a")
        for _ in range(3):
            assert (await socket.response())[-1]["type"] == "response.completed"


# --- cancelling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["response_id", "stream_id"])
async def test_cancelling_ends_the_response_itself(launch: Launch, by: str) -> None:
    """Guards against a cancel that is answered by something else than the response's own end."""
    running = await launch(FakeEngine(Script(tokens=["x"] * 1000, rounds=(1,))))
    async with running.socket() as socket:
        await socket.create(stream_id="a")
        events = await socket.until("response.output_text.delta")
        target = events[0]["response"]["id"] if by == "response_id" else "a"
        await socket.send({"type": "response.cancel", by: target})
        events += await socket.until(*TERMINAL)
        check_response(events)
        assert events[-1]["type"] == "response.cancelled"
        assert events[-1]["response"]["status"] == "cancelled"
        assert events[-1]["response"]["usage"]["output_tokens"] > 0
        await eventually(lambda: running.engine.live == 0)
        await socket.create(max_output_tokens=1)
        assert (await socket.response())[-1]["type"] == "response.incomplete"


async def test_cancelling_while_the_prompt_is_tokenised(running: Running) -> None:
    """Guards against a response that cannot be cancelled before the engine has it, or that starts all the same."""
    running.tokenizer.gate.clear()
    async with running.socket() as socket:
        await socket.create(stream_id="a")
        await eventually(lambda: len(running.tokenizer.chats) == 1)
        await socket.send({"type": "response.cancel", "stream_id": "a"})
        events = await socket.response()
        assert [e["type"] for e in events] == [
            "response.created",
            "response.in_progress",
            "response.cancelled",
        ]
        running.tokenizer.gate.set()
        await socket.create(stream_id="a")
        assert (await socket.response())[-1]["type"] == "response.completed"
    assert len(running.engine.submitted) == 1


async def test_cancelling_a_lane_ends_what_waits_in_it_in_order(running: Running) -> None:
    """Guards against waiting responses that vanish without an end, or end before the one they wait for."""
    running.engine.gate.clear()
    async with running.socket() as socket:
        for number in range(3):
            await socket.create(stream_id="a", metadata={"n": str(number)})
        await eventually(lambda: running.engine.live == 1)
        await socket.send({"type": "response.cancel", "stream_id": "a"})
        ends = [(await socket.response())[-1] for _ in range(3)]
    assert [end["type"] for end in ends] == ["response.cancelled"] * 3
    assert [end["response"]["metadata"]["n"] for end in ends] == ["0", "1", "2"]
    assert len(running.engine.submitted) == 1


@pytest.mark.parametrize(
    ("event", "param"),
    [({"response_id": "resp_no"}, "response_id"), ({"stream_id": "z"}, "stream_id"), ({}, "response_id")],
)
async def test_cancelling_nothing_is_an_error(running: Running, event: Event, param: str) -> None:
    """Guards against silence where a client waits for an answer."""
    async with running.socket() as socket:
        await socket.send({"type": "response.cancel", "event_id": "c", **event})
        error = await socket.receive()
        assert (error["type"], error["error"]["param"], error["event_id"]) == ("error", param, "c")


# --- many ---------------------------------------------------------------------------------------------------------


async def test_many_sockets_at_once(launch: Launch) -> None:
    """Guards against streams that get each other's events."""

    def script(request: Any) -> Script:
        word = bytes(request.prompt_ids).decode().split(">")[1].strip()
        return Script(tokens=[f"{word}-{i} " for i in range(20)])

    running = await launch(FakeEngine(script))

    async def one(number: int) -> None:
        async with running.socket() as socket:
            await socket.create(input=f"q{number}")
            assert text_of(await socket.response()) == "".join(f"q{number}-{i} " for i in range(20))

    await asyncio.gather(*(one(number) for number in range(24)))


async def test_capacity_and_client_limits_are_told_apart(launch: Launch) -> None:
    """Guards against refusals that do not say whether waiting, or asking for less, would help."""
    engine = FakeEngine(info=model_info(max_num_seqs=1))
    running = await launch(engine, max_queue=1, max_streams_per_client=2)
    engine.gate.clear()
    async with running.socket() as socket:
        for lane in "abc":
            await socket.create(stream_id=lane)
        error = (await socket.until("error"))[-1]
        assert (error["status"], error["error"]["code"], error["stream_id"]) == (503, "overloaded", "c")
        assert error["retry_after_s"] > 0
    engine = FakeEngine()
    running = await launch(engine, max_streams_per_client=2)
    engine.gate.clear()
    async with running.socket() as socket:
        for lane in "abc":
            await socket.create(stream_id=lane)
        error = (await socket.until("error"))[-1]
        assert (error["status"], error["error"]["code"]) == (429, "rate_limit_exceeded")
