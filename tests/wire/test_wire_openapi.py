"""The OpenAPI document: it is one, it has every route, and real answers are as it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from dspark_stream.server import openapi, wire
from dspark_stream.server.app import SERVICE, build_app
from dspark_stream.server.elsewhere import PATTERN
from dspark_stream.server.settings import ServerConfig
from fakes import FakeEngine, FakeTokenizer
from wire.harness import Launch, Running


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(openapi.document())
    return found


def check(document: dict[str, Any], schema: dict[str, Any], value: object) -> None:
    """Whether a value is as a schema of the document says."""
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def of_route(document: dict[str, Any], path: str, method: str, status: str, kind: str = "application/json") -> Any:
    return document["paths"][path][method]["responses"][status]["content"][kind]["schema"]


def test_it_is_a_valid_document(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()


async def test_every_route_is_in_it_and_nothing_else(document: dict[str, Any]) -> None:
    app = build_app(ServerConfig(), FakeEngine(), FakeTokenizer())
    try:
        routes = {
            (resource.canonical, route.method.lower())
            for resource in app.router.resources()
            if resource.canonical != PATTERN.replace(":.*", "")
            for route in resource
            if route.method != "HEAD"  # a GET without its body
        }
    finally:
        app[SERVICE].close()
    assert routes == {(path, method) for path, item in document["paths"].items() for method in item}


def test_every_event_is_in_it(document: dict[str, Any]) -> None:
    told = {ref["$ref"].rpartition("/")[2] for ref in document["paths"]["/v1/responses"]["get"]["x-server-events"]}
    assert told == {kind.__name__ for kind in wire.ServerEvent.__args__}
    assert told <= set(document["components"]["schemas"])


def test_fields_say_what_the_source_says_of_them(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["DsparkStats"]["properties"]["max_tokens"]["description"] == "The limit that the engine was given."
    assert "tools" in schemas["ChatBody"]["properties"]["tools"]["description"]
    assert "schema or a grammar" in schemas["ResponseCreate"]["properties"]["guided_json"]["description"]


async def test_it_is_served_without_a_key(launch: Launch) -> None:
    running = await launch(api_key="secret")
    async with running.http() as http, http.get("/openapi.json") as answer:
        assert answer.status == 200
        assert answer.content_type == "application/json"
        assert (await answer.json())["openapi"] == "3.1.0"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/completions", {"prompt": "hello"}),
    ],
)
async def test_answers_are_as_it_says(running: Running, document: dict[str, Any], path: str, body: Any) -> None:
    check(document, document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"], body)
    async with running.http() as http:
        async with http.post(path, json=body) as answer:
            check(document, of_route(document, path, "post", "200"), await answer.json())
        async with http.post(path, json={**body, "stream": True}) as answer:
            lines = (await answer.text()).splitlines()
        async with http.post(path, json={**body, "colour": "red"}) as answer:
            assert answer.status == 400
            check(document, of_route(document, path, "post", "default"), await answer.json())
    frames = [line.removeprefix("data: ") for line in lines if line.startswith("data: ") and line != "data: [DONE]"]
    assert len(frames) > 2
    for frame in frames:
        check(document, of_route(document, path, "post", "200", "text/event-stream"), json.loads(frame))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/health", "/ready", "/props"])
async def test_pages_are_as_it_says(running: Running, document: dict[str, Any], path: str) -> None:
    async with running.http() as http, http.get(path.replace("{name}", "fake-135m")) as answer:
        assert answer.status == 200
        body = await answer.json()
    schema = of_route(document, path, "get", "200")
    check(document, schema, body)
    named = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    assert set(body) <= set(named["properties"]), "an answer has fields that the document does not know"


async def test_events_of_a_socket_are_as_it_says(running: Running, document: dict[str, Any]) -> None:
    events = {"anyOf": document["paths"]["/v1/responses"]["get"]["x-server-events"]}
    async with running.socket() as socket:
        await socket.create(dspark={"steps": True})
        seen = [socket.hello, *await socket.response()]
        await socket.send({"type": "response.create", "colour": "red"})
        seen.append(await socket.receive())
    assert {"dspark:hello", "dspark:step", "response.completed", "error"} <= {event["type"] for event in seen}
    for event in seen:
        check(document, events, event)
