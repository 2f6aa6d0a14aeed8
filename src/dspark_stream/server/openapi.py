"""The OpenAPI document: made from the structs that decode requests and encode answers, so that it says what they do.

What a struct says of a field below it is the field's description here too; a field of another service's API that is
known and not honoured carries the reason (`refusals.RULES`).
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any, Literal

import msgspec

from dspark_stream import __version__
from dspark_stream.server import bodies, chat, completions, wire
from dspark_stream.server.exposition import OPEN_METRICS, TEXT
from dspark_stream.server.refusals import RULES
from dspark_stream.types import ModelInfo

REF = "#/components/schemas/{name}"
Schema = dict[str, Any]


# --- answers that are written as plain objects ------------------------------------------------------------------


class ErrorAnswer(msgspec.Struct, kw_only=True):
    """What every refusal looks like."""

    error: wire.ErrorBody


class ModelCard(msgspec.Struct, kw_only=True):
    """A name under which the model is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """The model's own name."""
    max_model_len: int
    """Most tokens of prompt and answer together."""


class ModelList(msgspec.Struct, kw_only=True):
    """All names under which the model is served."""

    object: Literal["list"]
    data: list[ModelCard]


class Probe(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How the service is."""

    status: str
    reason: str | msgspec.UnsetType = msgspec.UNSET


class Props(msgspec.Struct, kw_only=True):
    """What is served, and its limits."""

    version: str
    model: ModelInfo
    limits: dict[str, int]
    subprotocols: list[str]
    uptime_s: float


CLIENT_EVENTS: tuple[type[msgspec.Struct], ...] = (bodies.ResponseCreate, bodies.ResponseCancel)
SERVER_EVENTS: tuple[type[msgspec.Struct], ...] = (
    wire.Hello,
    wire.Created,
    wire.InProgress,
    wire.OutputItemAdded,
    wire.ContentPartAdded,
    wire.TextDelta,
    wire.Step,
    wire.TextDone,
    wire.ContentPartDone,
    wire.OutputItemDone,
    wire.Completed,
    wire.Incomplete,
    wire.Failed,
    wire.Cancelled,
    wire.ErrorEvent,
)
"""In the order in which a socket sees them."""
_SPOKEN: tuple[type[msgspec.Struct], ...] = (
    *CLIENT_EVENTS,
    *SERVER_EVENTS,
    bodies.ResponseBody,
    bodies.ChatBody,
    bodies.CompletionBody,
    wire.ResponseObject,
    chat.Completion,
    chat.Chunk,
    completions.TextCompletion,
    ErrorAnswer,
    ModelList,
    Probe,
    Props,
)


# --- the document -------------------------------------------------------------------------------------------------


@cache
def document() -> bytes:
    """The document as JSON. The first call reads sources and takes some ten milliseconds: not on the loop."""
    return msgspec.json.encode(describe())


def describe() -> Schema:
    """The document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "dspark-stream",
            "version": __version__,
            "summary": "Streams text from DSpark speculative decoding.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": _paths(),
        "components": {
            "schemas": schemas(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "Where the service asks for a key."}
            },
        },
    }


@cache
def schemas() -> Schema:
    """JSON schemas of all that is sent and received, by the struct's name."""
    _, found = msgspec.json.schema_components(_SPOKEN, ref_template=REF)
    notes = _notes(bodies, chat, completions, wire, sys.modules[__name__], inspect.getmodule(ModelInfo))
    bases = {kind.__name__: kind.__mro__ for kind in _SPOKEN}
    for name, schema in found.items():
        for field, said in schema.get("properties", {}).items():
            owners = [name, *(base.__name__ for base in bases.get(name, ()))]
            note = next((notes[owner, field] for owner in owners if (owner, field) in notes), None)
            if note is not None:
                said["description"] = note
            elif set(said) == {"default"}:  # any value: it is known, and that is all
                asks = field in RULES
                said["description"] = f"Refused unless it asks for nothing: {RULES[field].reason}." if asks else _UNREAD
    return found


_UNREAD = "Taken and not looked at: nothing here depends on it."


def _notes(*modules: ModuleType | None) -> dict[tuple[str, str], str]:
    """What stands below fields in the sources, by class and field; nothing where there are no sources."""
    found: dict[tuple[str, str], str] = {}
    for module in modules:
        try:
            tree = ast.parse(inspect.getsource(module)) if module is not None else ast.Module([], [])
        except OSError:
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found |= {(node.name, field): " ".join(text.split()) for field, text in _noted(node)}
    return found


def _noted(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(node.body, node.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, text


def _ref(kind: type[msgspec.Struct]) -> Schema:
    return {"$ref": REF.format(name=kind.__name__)}


def _json(kind: type[msgspec.Struct], text: str) -> Schema:
    return {"description": text, "content": {"application/json": {"schema": _ref(kind)}}}


_CHUNKS = "A chunk a frame, then `[DONE]`."
_ERRORS = {"default": _json(ErrorAnswer, "Refused; 429 and 503 say in `Retry-After` when to come back.")}
_KEYED: list[dict[str, list[str]]] = [{"key": []}, {}]


def _paths() -> Schema:
    events = {"anyOf": [_ref(kind) for kind in SERVER_EVENTS if kind not in (wire.Hello, wire.ErrorEvent)]}
    return {
        "/v1/responses": {
            "get": _upgrade(),
            "post": _generates(
                "Make a response", bodies.ResponseBody, wire.ResponseObject, events, "An event of the response a frame."
            ),
        },
        "/v1/chat/completions": {
            "post": _generates(
                "Go on with a chat",
                bodies.ChatBody,
                chat.Completion,
                _ref(chat.Chunk),
                _CHUNKS,
            )
        },
        "/v1/completions": {
            "post": _generates(
                "Go on with a text",
                bodies.CompletionBody,
                completions.TextCompletion,
                _ref(completions.TextCompletion),
                _CHUNKS,
            )
        },
        "/v1/models": {"get": _gets("List the model's names", ModelList)},
        "/v1/models/{name}": {
            "get": _gets("One of the model's names", ModelCard)
            | {
                "parameters": [
                    {
                        "name": "name",
                        "in": "path",
                        "required": True,
                        "description": "May have slashes.",
                        "schema": {"type": "string"},
                    }
                ]
            }
        },
        "/health": {"get": _probe("get_health", "The process and its engine live", "The engine has failed.")},
        "/ready": {"get": _probe("get_ready", "New work would be taken and done", "Draining, stuck, or failed.")},
        "/props": {"get": _gets("What is served, and its limits", Props)},
        "/metrics": {
            "get": {
                "summary": "Figures for Prometheus",
                "operationId": "get_metrics",
                "security": _KEYED,
                "responses": {
                    "200": {
                        "description": "OpenMetrics where `Accept` asks for it.",
                        "content": {kind: {"schema": {"type": "string"}} for kind in (TEXT, OPEN_METRICS)},
                    },
                    **_ERRORS,
                },
            }
        },
        "/openapi.json": {
            "get": {
                "summary": "This document",
                "operationId": "get_openapi_json",
                "security": [],
                "responses": {
                    "200": {
                        "description": "OpenAPI 3.1.",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    },
                    **_ERRORS,
                },
            }
        },
    }


def _generates(
    summary: str, body: type[msgspec.Struct], answer: type[msgspec.Struct], streamed: Schema, frames: str
) -> Schema:
    return {
        "summary": summary,
        "operationId": f"create_{answer.__name__}",
        "security": _KEYED,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
        "responses": {
            "200": {
                "description": f"The whole answer; with `stream: true` server-sent events. {frames}",
                "content": {"application/json": {"schema": _ref(answer)}, "text/event-stream": {"schema": streamed}},
            },
            **_ERRORS,
        },
    }


def _gets(summary: str, answer: type[msgspec.Struct]) -> Schema:
    return {
        "summary": summary,
        "operationId": f"get_{answer.__name__}",
        "security": _KEYED,
        "responses": {"200": _json(answer, "As it is now."), **_ERRORS},
    }


def _probe(name: str, summary: str, otherwise: str) -> Schema:
    return {
        "summary": summary,
        "operationId": name,
        "security": [],
        "responses": {"200": _json(Probe, "It is so."), "503": _json(Probe, otherwise)},
    }


def _upgrade() -> Schema:
    return {
        "summary": "Responses over a WebSocket",
        "description": "Messages are events, in JSON or MessagePack as the subprotocol says. OpenAPI has no words for "
        "sockets: `x-client-events` may be sent, `x-server-events` come back.",
        "operationId": "open_socket",
        "security": _KEYED,
        "parameters": [
            {
                "name": "Sec-WebSocket-Protocol",
                "in": "header",
                "description": "JSON where none is offered.",
                "schema": {"type": "string", "examples": [wire.JSON_PROTOCOL, wire.MSGPACK_PROTOCOL]},
            }
        ],
        "responses": {"101": {"description": "The socket is open; `dspark:hello` comes first."}, **_ERRORS},
        "x-client-events": [_ref(kind) for kind in CLIENT_EVENTS],
        "x-server-events": [_ref(kind) for kind in SERVER_EVENTS],
    }
