"""What everyday clients send: taken, read past, or refused for the reason that holds, and what answers say of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dspark_stream.server.bodies import ChatBody, CompletionBody, DsparkOptions, ResponseBody
from dspark_stream.types import GenerationRequest
from fakes import FakeEngine, Script
from wire.harness import Launch, Running, text_of

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "hello"},
    "/v1/completions": {"prompt": "hello"},
}
LIMITS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/completions": "max_tokens",
}
BODIES = {"/v1/chat/completions": ChatBody, "/v1/responses": ResponseBody, "/v1/completions": CompletionBody}
routes = pytest.mark.parametrize("route", ROUTES)


async def post(running: Running, path: str, fields: dict[str, Any], status: int = 200) -> tuple[Any, dict[str, str]]:
    async with running.http() as http, http.post(path, json={**ROUTES[path], **fields}) as answer:
        body = await answer.json()
        assert answer.status == status, body
        return body, dict(answer.headers)


async def stream(running: Running, path: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    body = {**ROUTES[path], **fields, "stream": True}
    async with running.http() as http, http.post(path, json=body) as answer:
        text = await answer.text()
        assert answer.status == 200, text
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in data if line != "[DONE]"]


async def asked(running: Running, path: str, fields: dict[str, Any]) -> GenerationRequest:
    """What the engine is given."""
    await post(running, path, fields)
    return running.engine.submitted[-1]


# --- how the answer is to be written ---------------------------------------------------------------------------


@routes
async def test_penalties_biases_and_least_tokens_reach_the_engine(running: Running, route: str) -> None:
    """Guards against fields that are taken on one route and lost or refused on another."""
    fields = {
        "frequency_penalty": 0.5,
        "presence_penalty": -1,
        "repetition_penalty": 1.1,
        "logit_bias": {"40": 100, "7": -0.5, "8": 0},
        "min_tokens": 3,
        LIMITS[route]: 9,
        "ignore_eos": True,
        "stop_token_ids": [5],
        "stop": None,
        "top_k": 3,
        "min_p": 0.1,
    }
    s = (await asked(running, route, fields)).sampling
    assert (s.frequency_penalty, s.presence_penalty, s.repetition_penalty) == (0.5, -1, 1.1)
    assert s.logit_bias == ((7, -0.5), (40, 100))
    assert (s.min_tokens, s.max_tokens, s.ignore_eos, s.stop_token_ids) == (3, 9, True, (5,))
    assert (s.stop, s.top_k, s.min_p) == ((), 3, 0.1)


@routes
async def test_null_is_the_same_as_nothing(running: Running, route: str) -> None:
    """Guards against clients that write every field that they know being refused."""
    await post(running, route, {})
    names = {*BODIES[route].__struct_fields__} - {"messages", "input", "prompt"}
    await post(running, route, {**dict.fromkeys(names), "dspark": dict.fromkeys(DsparkOptions.__struct_fields__)})
    await post(running, route, {"dspark": None})
    plain, *others = [request.sampling for request in running.engine.submitted]
    for other in others:
        assert {name: getattr(other, name) for name in other.__struct_fields__ if name != "seed"} == {
            name: getattr(plain, name) for name in plain.__struct_fields__ if name != "seed"
        }


@routes
@pytest.mark.parametrize("wanted", [-1, 2048, 10**30])
async def test_a_limit_past_the_context_is_cut_and_said(running: Running, route: str, wanted: int) -> None:
    """Guards against refusing clients that mean "as much as you can", and against cutting without a word."""
    param = LIMITS[route]
    body, headers = await post(running, route, {param: wanted})
    request = running.engine.submitted[-1]
    room = 2048 - len(request.prompt_ids)
    assert request.sampling.max_tokens == room
    (warning,) = body["dspark"]["warnings"]
    assert warning.startswith(f"`{param}` is ")
    assert f"room for {room}," in warning
    assert headers["X-Dspark-Warning"] == warning
    assert body["dspark"]["max_tokens"] == room
    if route == "/v1/responses":
        assert body["max_output_tokens"] == room
    async with running.http() as http:
        async with http.post(route, json={**ROUTES[route], param: wanted, "stream": True}) as answer:
            assert answer.headers["X-Dspark-Warning"] == warning
            assert warning in await answer.text()
        async with http.post(route, json={**ROUTES[route], param: 5}) as answer:
            assert "X-Dspark-Warning" not in answer.headers
            assert "warnings" not in (await answer.json())["dspark"]


async def test_least_tokens_raise_the_limit_that_nobody_set(running: Running) -> None:
    """Guards against a default that stops an answer before the least that was asked for."""
    sampling = (await asked(running, "/v1/chat/completions", {"min_tokens": 1500})).sampling
    assert (sampling.min_tokens, sampling.max_tokens) == (1500, 1500)
    body, _ = await post(running, "/v1/chat/completions", {"min_tokens": 5000})
    sampling = running.engine.submitted[-1].sampling
    assert sampling.min_tokens == sampling.max_tokens < 2048
    assert body["dspark"]["warnings"][0].startswith("`min_tokens` is 5000")


async def test_top_p_0_is_the_likeliest_token(running: Running) -> None:
    """Guards against refusing what OpenAI takes."""
    sampling = (await asked(running, "/v1/chat/completions", {"top_p": 0, "temperature": 1.5})).sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("seed", "used"),
    [
        (0, 0),
        (42, 42),
        (2**63 - 1, 2**63 - 1),
        (2**63, 0),
        (2**64 - 1, 2**63 - 1),
        (-2, 2**63 - 2),
        (-(2**63), 0),
    ],
)
@routes
async def test_a_seed_selects_what_keeps_it(running: Running, route: str, seed: int, used: int) -> None:
    """Guards against a seed whose text depends on the load, and answers that do not say what they were made with."""
    body, _ = await post(running, route, {"seed": seed, "temperature": 1})
    request = running.engine.submitted[-1]
    assert (request.sampling.seed, request.verification) == (used, "coupled")
    said = body["dspark"]
    assert (said["seed"], said["verification"], said["mode"]) == (used, "coupled", "dspark")
    assert body["system_fingerprint"].startswith("fp_")
    again, _ = await post(running, route, {"seed": said["seed"]})
    assert running.engine.submitted[-1].sampling.seed == used
    assert again["system_fingerprint"] == body["system_fingerprint"]
    events = await stream(running, route, {"seed": seed})
    found = [e["dspark"] for e in events if "dspark" in e] or [events[-1]["response"]["dspark"]]
    assert [(one["seed"], one["verification"]) for one in found] == [(used, "coupled")]
    if route != "/v1/responses":
        assert {event["system_fingerprint"] for event in events} == {body["system_fingerprint"]}


@routes
async def test_without_a_seed_or_with_a_choice_of_ones_own(running: Running, route: str) -> None:
    """Guards against coupled verification, which accepts less, where nobody wants a text again."""
    for fields, verification in (
        ({}, "rejection"),
        ({"seed": -1}, "rejection"),
        ({"seed": None}, "rejection"),
        ({"dspark": {"seed": 3}}, "coupled"),
        ({"seed": 3, "dspark": {"verification": "rejection"}}, "rejection"),
        ({"dspark": {"verification": "coupled"}}, "coupled"),
    ):
        assert (await asked(running, route, fields)).verification == verification, fields
    seeds = {(await asked(running, route, {"seed": -1})).sampling.seed for _ in range(4)}
    assert len(seeds) == 4
    assert max(seeds) < 2**53  # JavaScript can write it down


# --- usage while it streams ------------------------------------------------------------------------------------


async def test_usage_in_every_chunk(running: Running) -> None:
    """Guards against benchmarks that count tokens by chunks that do not say."""
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for route in ("/v1/chat/completions", "/v1/completions"):
        events = await stream(running, route, options)
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert counts[-1] == counts[-2] == 10
        assert {event["usage"]["prompt_tokens"] for event in events} == {len(running.engine.submitted[-1].prompt_ids)}
        assert events[-1]["choices"] == []
    events = await stream(running, "/v1/responses", options)
    deltas = [event["usage"] for event in events if event["type"] == "response.output_text.delta"]
    assert [usage["output_tokens"] for usage in deltas] == [3, 4, 6, 9, 10]
    assert deltas[-1] == {**events[-1]["response"]["usage"]}
    plain = await stream(running, "/v1/responses", {})
    assert not any("usage" in event for event in plain)


# --- histories of other services -------------------------------------------------------------------------------


async def test_fields_of_other_services_are_read_past(running: Running) -> None:
    """Guards against conversations that began elsewhere, or with another client, and cannot go on here."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "rules", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "hi", "id": "m1", "name": "ann", "timestamp": 5},
        {
            "role": "assistant",
            "content": "hello",
            "reasoning_content": "the user greets",
            "reasoning": {"effort": "low"},
            "thinking_blocks": [],
            "provider_specific_fields": None,
            "refusal": None,
            "annotations": [],
            "audio": None,
            "tool_calls": [],
            "function_call": None,
        },
        {"role": "user", "content": ["one", {"type": "input_text", "text": "two"}, {"text": "three"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "ok"},
            ],
        },
        {"role": "assistant", "content": None, "refusal": "I cannot."},
        {"role": "user", "content": []},
        {"role": "user", "content": "again"},
    ]
    await post(running, "/v1/chat/completions", {"messages": messages})
    assert running.tokenizer.chats[-1] == [
        ("system", "rules"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", ("one", "two", "three")),
        ("assistant", "ok"),
        ("assistant", "I cannot."),
        ("user", ""),
        ("user", "again"),
    ]
    items = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "…"},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "phase": "final",
            "content": [
                {"type": "output_text", "text": "a", "annotations": [], "logprobs": []},
                {"type": "refusal", "refusal": "b"},
            ],
        },
        {"role": "user", "content": "c", "status": None, "id": None, "mood": 1},
    ]
    await post(running, "/v1/responses", {"input": items})
    assert running.tokenizer.chats[-1] == [("assistant", ("a", "b")), ("user", "c")]


REASONS: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 2}, "n", "one answer"),
    ({"best_of": 3}, "best_of", "one answer"),
    ({"tools": [{"type": "function"}]}, "tools", "calls of tools"),
    ({"tool_choice": "required"}, "tool_choice", "calls of tools"),
    ({"functions": [{}]}, "functions", "calls of tools"),
    ({"response_format": {"type": "json_object"}}, "response_format", "schema"),
    ({"guided_json": {}}, "guided_json", "schema"),
    ({"logprobs": True}, "logprobs", "probabilities"),
    ({"top_logprobs": 2}, "top_logprobs", "probabilities"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "reasons"),
    ({"modalities": ["audio"]}, "modalities", "text only"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs", "chat template"),
    ({"prediction": {"type": "content"}}, "prediction", "drafter"),
    ({"use_beam_search": True}, "use_beam_search", "search"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "calls of tools"),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "calls of tools",
    ),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio", "text only"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "only text",
    ),
]


@pytest.mark.parametrize(("fields", "param", "says"), REASONS, ids=lambda v: str(v)[:50])
async def test_what_is_refused_says_why_it_is(running: Running, fields: dict[str, Any], param: str, says: str) -> None:
    """Guards against one reason for everything, which sends people looking in the wrong place."""
    body, _ = await post(running, "/v1/chat/completions", fields, 400)
    assert (body["error"]["param"], body["error"]["type"]) == (param, "invalid_request_error")
    assert says in body["error"]["message"]
    assert not running.engine.submitted


@routes
async def test_rounds_are_told_where_there_are_events_and_refused_elsewhere(running: Running, route: str) -> None:
    """Guards against `steps` that does nothing, and says nothing of it."""
    for streams in (False, True):
        if streams and route == "/v1/responses":
            events = await stream(running, route, {"dspark": {"steps": True}})
            assert sum(event["type"] == "dspark:step" for event in events) == 5
            continue
        error = (await post(running, route, {"stream": streams, "dspark": {"steps": True}}, 400))[0]["error"]
        assert (error["param"], error["code"]) == ("dspark.steps", "unsupported_value")
        assert "/v1/responses" in error["message"]
    await post(running, route, {"dspark": {"steps": False}})


@routes
async def test_what_a_route_calls_otherwise_is_named(running: Running, route: str) -> None:
    """Guards against "not a known field" for what the route has by another name, or elsewhere."""
    names = {"max_tokens", "max_completion_tokens", "max_output_tokens"} - set(BODIES[route].__struct_fields__)
    assert names
    limit = "max_completion_tokens" if "chat" in route else LIMITS[route]
    for name, here in [(name, limit) for name in names] + [("mode", "dspark.mode")]:
        error = (await post(running, route, {name: 5}, 400))[0]["error"]
        assert (error["param"], error["code"]) == (name, "unknown_field")
        assert error["message"].endswith(f"here it is `{here}`")


# --- prompts that are too long ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["x" * 500_000, "é" * 1500], ids=["bytes", "tokens"])
@routes
async def test_an_overflow_is_what_clients_look_for(running: Running, route: str, text: str) -> None:
    """Guards against words by which LangChain's and LiteLLM's fallbacks do not know an overflow."""
    param = {"/v1/responses": "input", "/v1/completions": "prompt"}.get(route, "messages")
    value = [{"role": "user", "content": text}] if param == "messages" else text
    error = (await post(running, route, {param: value}, 400))[0]["error"]
    assert error["message"].startswith("This model's maximum context length is 2048 tokens. However, ")
    assert "context_length_exceeded" in error["message"]  # the openai package shows LangChain nothing else
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


# --- completions -----------------------------------------------------------------------------------------------


async def test_a_text_is_gone_on_with(running: Running) -> None:
    """Guards against benchmarks' plain prompts being refused, or seen through a chat template."""
    for prompt, ids in (
        ("Once upon", list(b"Once upon")),
        (["Once upon"], list(b"Once upon")),
        ([5, 6, 7], [5, 6, 7]),
        ([[5, 6, 7]], [5, 6, 7]),
    ):
        body, _ = await post(running, "/v1/completions", {"prompt": prompt, "max_tokens": 4})
        assert list(running.engine.submitted[-1].prompt_ids) == ids
        assert body["id"].startswith("cmpl_")
    assert body["choices"] == [{"text": "w0 w1 w2 w3 ", "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert body["object"] == "text_completion"
    assert not running.tokenizer.chats
    assert (await asked(running, "/v1/completions", {})).sampling.max_tokens == 16
    events = await stream(running, "/v1/completions", {"stream_options": {"include_usage": True}})
    assert "".join(c["text"] for e in events for c in e["choices"]) == "".join(f"w{i} " for i in range(10))
    assert all(choice["text"] for choice in events[0]["choices"])
    assert [c["finish_reason"] for e in events for c in e["choices"]][-1] == "stop"
    assert events[-1]["usage"]["completion_tokens"] == 10
    assert {event["object"] for event in events} == {"text_completion"}


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "empty"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [""]}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", "b"]}, "prompt", "2 prompts"),
    ({"prompt": [[1], [2]]}, "prompt", "2 prompts"),
    ({"prompt": [1, "a"]}, "prompt[1]", "token id"),
    ({"prompt": [1, 1000]}, "prompt[1]", "from 0 to 999"),
    ({"prompt": [True]}, "prompt[0]", "token id"),
    ({"prompt": 5}, "prompt", "int"),
    ({"prompt": [1] * 3000}, "prompt", "maximum context length"),
    ({"echo": True}, "echo", "not repeated"),
    ({"suffix": "end"}, "suffix", "not filled in"),
    ({"best_of": 2}, "best_of", "one answer"),
    ({"logprobs": 1}, "logprobs", "probabilities"),
    ({"messages": []}, "messages", "not a known field"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD_COMPLETIONS, ids=lambda v: str(v)[:50])
async def test_completions_refuse_by_name(running: Running, fields: dict[str, Any], param: str, says: str) -> None:
    """Guards against options of the older API that are ignored without a word."""
    error = (await post(running, "/v1/completions", fields, 400))[0]["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert not running.engine.submitted


# --- a socket's own responses ----------------------------------------------------------------------------------


async def test_a_warm_up_generates_nothing_and_is_gone_on_with(running: Running) -> None:
    """Guards against refusing the first message of clients that open their socket ahead of time."""
    async with running.socket() as socket:
        await socket.create(input=[], instructions="be brief", generate=False, store=False)
        events = await socket.response()
        assert [event["type"] for event in events] == [
            "response.created",
            "response.in_progress",
            "response.completed",
        ]
        warm = events[-1]["response"]
        assert (warm["output"], warm["usage"]["total_tokens"]) == ([], 0)
        assert not running.engine.submitted
        await socket.create(input="one", generate=False, store=False, previous_response_id=warm["id"])
        second = (await socket.response())[-1]["response"]["id"]
        await socket.create(input="two", store=False, previous_response_id=second)
        events = await socket.response()
        assert text_of(events)
    assert running.tokenizer.chats == [[("user", "one"), ("user", "two")]]


async def test_a_failed_answer_is_not_gone_on_with(launch: Launch) -> None:
    """Guards against half an answer in the next turn's prompt."""
    running = await launch(FakeEngine(Script(fail_after_rounds=1)))
    async with running.socket() as socket:
        await socket.create(store=False)
        failed = (await socket.response())[-1]["response"]["id"]
        await socket.create(store=False, previous_response_id=failed)
        assert (await socket.receive())["error"]["code"] == "previous_response_not_found"
