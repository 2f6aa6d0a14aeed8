"""What clients send, as typed structs, and the one decoder that turns a bad message into an error naming the field.

Fields that OpenAI's clients may send but this service cannot honour are known by name: their harmless values pass,
anything else is refused, never silently ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from dspark_stream.errors import InvalidRequestError
from dspark_stream.types import Mode, Verification

T = TypeVar("T")
Encoding = Literal["json", "msgpack"]


class _Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class DsparkOptions(_Strict, kw_only=True):
    """The ``dspark`` object: what only this service can do."""

    mode: Mode = "dspark"
    verification: Verification = "rejection"
    seed: int | None = None
    steps: bool = False
    top_k: int | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    max_chunk_gap_ms: float | None = None


# --- message content -----------------------------------------------------------------------------------------


class InputText(_Strict, tag="input_text", tag_field="type", kw_only=True):
    """Text of a user, system or developer message."""

    text: str
    prompt_cache_breakpoint: Any = None


class OutputText(_Strict, tag="output_text", tag_field="type", kw_only=True):
    """Text that the model wrote in an earlier turn."""

    text: str
    annotations: Any = None
    logprobs: Any = None


class PlainText(_Strict, tag="text", tag_field="type", kw_only=True):
    """Text as the chat API writes it."""

    text: str
    prompt_cache_breakpoint: Any = None


Content = str | list[InputText | OutputText | PlainText]


class InputMessage(_Strict, kw_only=True):
    """One item of ``input``."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    type: str | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class ChatMessage(_Strict, kw_only=True):
    """One item of ``messages``."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content | None = None
    name: str | None = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None


# --- bodies ----------------------------------------------------------------------------------------------------


class StreamOptions(_Strict, kw_only=True):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class _Common(_Strict, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    dspark: DsparkOptions | None = None
    # Known, and harmless whatever they say.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    # Known, and refused unless harmless: see `HARMLESS`.
    tools: Any = None
    tool_choice: Any = None
    top_logprobs: Any = None
    service_tier: Any = None
    moderation: Any = None


class ResponseBody(_Common, kw_only=True):
    """Body of ``POST /v1/responses``."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None

    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    generate: Any = None
    image: Any = None
    include: Any = None
    prompt: Any = None
    reasoning: Any = None
    text: Any = None
    truncation: Any = None


class ChatBody(_Common, kw_only=True):
    """Body of ``POST /v1/chat/completions``; the sampling fields beyond OpenAI's are vLLM's."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    ignore_eos: bool | None = None

    n: Any = None
    logprobs: Any = None
    logit_bias: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    min_tokens: Any = None
    response_format: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None


class ResponseCreate(ResponseBody, tag="response.create", tag_field="type", kw_only=True):
    """Client event: begin a response."""

    event_id: str | None = None
    stream_id: str | None = None


class ResponseCancel(_Strict, tag="response.cancel", tag_field="type", kw_only=True):
    """Client event: end a response by its id, or everything in a lane."""

    response_id: str | None = None
    stream_id: str | None = None
    event_id: str | None = None


ClientEvent = ResponseCreate | ResponseCancel


class Envelope(msgspec.Struct):
    """The fields of a refused event that its error repeats."""

    type: Any = None
    event_id: Any = None
    stream_id: Any = None


# --- fields that cannot be honoured ----------------------------------------------------------------------------


def _one_of(*values: object) -> Callable[[Any], bool]:
    # ``True == 1`` in Python, but not to a client.
    return lambda value: any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def _empty(value: Any) -> bool:
    return value in ([], {})


def _plain_text(value: Any) -> bool:
    """``text`` that asks for nothing but text."""
    return (
        isinstance(value, dict)
        and set(value) <= {"format", "verbosity"}
        and value.get("format") in (None, {"type": "text"})
        and value.get("verbosity") in (None, "medium")
    )


def _no_reasoning(value: Any) -> bool:
    return isinstance(value, dict) and all(v in (None, "none") for v in value.values())


def _never(value: Any) -> bool:
    return False


HARMLESS: Mapping[str, Callable[[Any], bool]] = {
    "access_programs": _never,
    "annotations": _empty,
    "audio": _never,
    "background": _one_of(False),
    "background_options": _never,
    "context_management": _empty,
    "conversation": _never,
    "frequency_penalty": _one_of(0),
    "function_call": _one_of("none", "auto"),
    "functions": _empty,
    "generate": _one_of(True),
    "image": _never,
    "include": _empty,
    "logit_bias": _empty,
    "logprobs": _one_of(False),
    "min_tokens": _one_of(0),
    "modalities": lambda value: value == ["text"],
    "moderation": _never,
    "n": _one_of(1),
    "prediction": _never,
    "presence_penalty": _one_of(0),
    "prompt": _never,
    "reasoning": _no_reasoning,
    "reasoning_effort": _one_of("none"),
    "refusal": _never,
    "repetition_penalty": _one_of(1),
    "response_format": lambda value: value == {"type": "text"},
    "service_tier": _one_of("auto", "default"),
    "text": _plain_text,
    "tool_calls": _empty,
    "tool_choice": _one_of("auto", "none"),
    "tools": _empty,
    "top_logprobs": _one_of(0),
    "truncation": _one_of("disabled"),
    "verbosity": _one_of("medium"),
    "web_search_options": _never,
}


def refuse_unsupported(body: msgspec.Struct, *, prefix: str = "") -> None:
    """Raise for the first field that asks for something this service does not do."""
    for name in body.__struct_fields__:
        check = HARMLESS.get(name)
        value = getattr(body, name)
        if check is not None and value is not None and not check(value):
            raise InvalidRequestError(
                f"`{prefix}{name}` is not supported with this value: the service writes plain text only",
                param=prefix + name,
                code="unsupported_value",
            )


# --- decoding ---------------------------------------------------------------------------------------------------

_DECODERS: dict[tuple[Any, Encoding], Any] = {}


def _decoder(kind: Any, encoding: Encoding) -> Any:
    made = _DECODERS.get((kind, encoding))
    if made is None:
        codec = msgspec.json if encoding == "json" else msgspec.msgpack
        made = _DECODERS[kind, encoding] = codec.Decoder(kind)
    return made


def decode(data: str | bytes, kind: type[T] | Any, encoding: Encoding = "json") -> T:
    """Decode one message into ``kind``.

    Raises:
        InvalidRequestError: malformed, or a field that is unknown, missing or of the wrong type (``param``).
    """
    try:
        decoded: T = _decoder(kind, encoding).decode(data)
    except msgspec.ValidationError as error:
        raise field_error(error) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequestError(
            f"the message is not valid {'JSON' if encoding == 'json' else 'MessagePack'}: {error}",
            code=f"invalid_{encoding}",
        ) from None
    except RecursionError:
        raise InvalidRequestError("the message is nested too deeply", code=f"invalid_{encoding}") from None
    return decoded


def decode_event(data: str | bytes, encoding: Encoding) -> ClientEvent:
    """`decode` for what arrives on a socket."""
    return decode(data, ClientEvent, encoding)


def decode_envelope(data: str | bytes, encoding: Encoding) -> Envelope:
    """What can still be read of an event that `decode_event` refused; never raises."""
    try:
        return decode(data, Envelope, encoding)
    except InvalidRequestError:
        return Envelope()


def convert_item(item: dict[str, Any], kind: type[T], path: str) -> T:
    """Turn one item of a list into ``kind``; an error's ``param`` starts with ``path``."""
    item_type = item.get("type")
    if item_type is not None and item_type != "message":
        raise InvalidRequestError(
            f"`{path}.type`: {_shorten(repr(item_type))} items are not supported, only messages",
            param=f"{path}.type",
            code="unsupported_value",
        )
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        raise field_error(error, path) from None


_AT = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"Object (?P<how>contains unknown|missing required) field `(?P<name>[^`]*)`")


def _shorten(text: str) -> str:
    """An error repeats what the client wrote, but not a megabyte of it."""
    return text if len(text) <= 300 else text[:297] + "..."


def field_error(error: msgspec.ValidationError, path: str = "") -> InvalidRequestError:
    """Say which field a validation error is about, in the client's words."""
    found = _AT.match(str(error))
    assert found is not None  # the pattern matches any text
    what = _shorten(found["what"])
    # ``[...]`` is some value of a mapping; its key is not told.
    where = (path + (found["path"] or "")).lstrip(".").replace("[...]", "")
    named = _FIELD.search(found["what"])
    if named is not None:
        name = _shorten(named["name"])
        param = f"{where}.{name}" if where else name
        if named["how"].startswith("contains"):
            return InvalidRequestError(f"`{param}` is not a known field", param=param, code="unknown_field")
        return InvalidRequestError(f"`{param}` is required", param=param, code="missing_required_field")
    if where == "type":
        return InvalidRequestError(
            f"unknown event type: {what.removeprefix('Invalid value ')}; known are response.create and response.cancel",
            param="type",
            code="unknown_event",
        )
    if not where:
        return InvalidRequestError(f"the message must be an object: {what}", code="invalid_type")
    if what.startswith("Invalid value") and where.endswith(".type"):
        what += "; only text content is supported (input_text, output_text, text)"
    elif what.startswith("Invalid enum value"):
        what = what.replace("enum value", "value")
    return InvalidRequestError(f"`{where}`: {what}", param=where, code="invalid_type" if "Expected" in what else None)
