"""What clients send, as typed structs, and the one decoder that turns a bad message into an error naming the field.

Null in any field is the same as the field left out. Fields that are known and cannot be honoured are in `refusals`.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec
import numpy as np

from dspark_stream.errors import InvalidRequestError
from dspark_stream.server.messages import MAX_MESSAGES
from dspark_stream.server.refusals import shorten
from dspark_stream.types import Mode, Verification

T = TypeVar("T")
Encoding = Literal["json", "msgpack"]


class _Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class DsparkOptions(_Strict, kw_only=True):
    """The ``dspark`` object: what only this service can do, and a second home of some sampling fields."""

    mode: Mode | None = None
    verification: Verification | None = None
    seed: int | None = None
    steps: bool | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    max_chunk_gap_ms: float | None = None


# --- bodies ----------------------------------------------------------------------------------------------------


class StreamOptions(_Strict, kw_only=True):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Body(_Strict, kw_only=True):
    """What all requests may say; the sampling fields beyond OpenAI's are vLLM's."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    dspark: DsparkOptions | None = None

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    # Known, and harmless whatever they say: nothing is cached, billed or called by them.
    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    cache_salt: Any = None
    cache_prompt: Any = None
    request_id: Any = None
    parallel_tool_calls: Any = None
    max_tool_calls: Any = None
    include_reasoning: Any = None
    # Known, and refused unless harmless: see `refusals.RULES`.
    add_special_tokens: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    best_of: Any = None
    grammar: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    include_stop_str_in_output: Any = None
    json_schema: Any = None
    length_penalty: Any = None
    logprobs: Any = None
    moderation: Any = None
    n: Any = None
    priority: Any = None
    prompt_logprobs: Any = None
    repeat_penalty: Any = None
    response_format: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    service_tier: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    structured_outputs: Any = None
    thinking_token_budget: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: Any = None
    truncate_prompt_tokens: Any = None
    typical_p: Any = None
    use_beam_search: Any = None


class _Turns(Body, kw_only=True):
    """Bodies that the chat template makes a prompt of."""

    add_generation_prompt: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    continue_final_message: Any = None
    documents: Any = None
    mm_processor_kwargs: Any = None
    reasoning_effort: Any = None


class ResponseBody(_Turns, kw_only=True):
    """Body of ``POST /v1/responses``."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    generate: bool | None = None

    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    include: Any = None
    prompt: Any = None
    reasoning: Any = None
    text: Any = None
    truncation: Any = None


class ChatBody(_Turns, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    audio: Any = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionBody(Body, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[Any] | None = None
    max_tokens: int | None = None

    echo: Any = None
    suffix: Any = None


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


# --- decoding ---------------------------------------------------------------------------------------------------

_DECODERS: dict[tuple[Any, Encoding], Any] = {}


def _decoder(kind: Any, encoding: Encoding) -> Any:
    made = _DECODERS.get((kind, encoding))
    if made is None:
        codec = msgspec.json if encoding == "json" else msgspec.msgpack
        made = _DECODERS[kind, encoding] = codec.Decoder(kind)
    return made


SMALL = 32_768
"""Bytes of a message that is decoded whatever is in it."""


def most_values(context: int) -> int:
    """Values that a message may have for a model with so long a context: a prompt of token ids, and 16 for each of as
    many messages as a request may have.

    A value takes some 0.1 to 0.3 µs to decode, and nobody else is served meanwhile: a thread would not help, since it
    would keep the interpreter's lock.
    """
    return context + 16 * MAX_MESSAGES


def decode(data: str | bytes, kind: type[T] | Any, encoding: Encoding = "json", most: int | None = None) -> T:
    """Decode one message into ``kind``. ``most``: see `most_values`; None: no bound.

    Raises:
        InvalidRequestError: malformed, too many values, or a field that is unknown, missing or of the wrong type
            (``param``).
    """
    if most is not None and len(data) > SMALL and _has_more_values(data, encoding, most):
        raise InvalidRequestError(f"the message has more than {most} values", code="too_many_values")
    try:
        decoded: T = _decoder(kind, encoding).decode(data)
    except msgspec.ValidationError as error:
        raise field_error(error, kind) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequestError(
            f"the message is not valid {'JSON' if encoding == 'json' else 'MessagePack'}: {error}",
            code=f"invalid_{encoding}",
        ) from None
    except RecursionError:
        raise InvalidRequestError("the message is nested too deeply", code=f"invalid_{encoding}") from None
    return decoded


def _has_more_values(data: str | bytes, encoding: Encoding, most: int) -> bool:
    """Whether there are more values than ``most``, found out without making any.

    In JSON they are counted by what stands before each: a comma, or the bracket or brace that it is the first in. In
    MessagePack by the bytes that may begin an array or a map. Text has such bytes too, ideographs most of all: one a
    character, of which three and more make a token only where hardly anybody writes so. Numbers of an array are not
    counted; a megabyte of them takes a few milliseconds, and a prompt of too many is to be told the context's length.
    """
    if encoding == "msgpack":
        octets = np.frombuffer(data if isinstance(data, bytes) else data.encode(), dtype=np.uint8)
        context = most - 16 * MAX_MESSAGES
        return int(np.count_nonzero(((octets & 0xE0) == 0x80) | ((octets & 0xFC) == 0xDC))) > most + 2 * context
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    if _marks(data) <= most:  # those in strings included
        return False
    if b"\\" in data:
        data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    if data.count(b'"') <= SMALL // 4:  # few and long strings, as texts are
        bare = b"".join(data.split(b'"')[::2]).translate(None, b" \t\r\n")
        return _marks(bare) - _numbers(np.frombuffer(bare, np.uint8)) > most
    found, in_string = 0, False
    data = data.translate(None, b" \t\r\n")
    for start in range(0, len(data), SMALL):  # in pieces that stay in the cache, and no more of them than are needed
        octets = np.frombuffer(data, np.uint8, min(SMALL, len(data) - start), start)
        strings = np.logical_xor.accumulate(octets == ord('"')) ^ in_string
        before_value = (octets == ord(",")) | (octets == ord("[")) | (octets == ord("{"))
        found += int(np.count_nonzero(before_value & ~strings)) - _numbers(np.where(strings, 0, octets))
        if found > most:
            return True
        in_string = bool(strings[-1])
    return False


def _marks(data: bytes) -> int:
    return sum(map(data.count, (b",", b"[", b"{")))


def _numbers(octets: np.ndarray) -> int:
    """Numbers of arrays, but for the first of each: what a comma and a digit or a sign begin."""
    after = octets[1:]
    return int(np.count_nonzero((octets[:-1] == ord(",")) & (((after - ord("0")) < 10) | (after == ord("-")))))


def decode_event(data: str | bytes, encoding: Encoding, most: int | None = None) -> ClientEvent:
    """`decode` for what arrives on a socket."""
    return decode(data, ClientEvent, encoding, most)


def decode_envelope(data: str | bytes, encoding: Encoding, most: int | None = None) -> Envelope:
    """What can still be read of an event that `decode_event` refused; never raises."""
    try:
        return decode(data, Envelope, encoding, most)
    except InvalidRequestError:
        return Envelope()


_AT = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"Object (?P<how>contains unknown|missing required) field `(?P<name>[^`]*)`")


def field_error(error: msgspec.ValidationError, kind: Any) -> InvalidRequestError:
    """Say which field of ``kind`` a validation error is about, in the client's words."""
    text = str(error)
    if len(text) > 2000:  # a pattern takes its time over a megabyte; where it happened stands at the end
        text = f"{text[:1000]}...{text[-1000:]}"
    found = _AT.match(text)
    assert found is not None  # the pattern matches any text
    what = shorten(found["what"])
    # ``[...]`` is some value of a mapping; its key is not told.
    where = (found["path"] or "").lstrip(".").replace("[...]", "")
    named = _FIELD.search(found["what"])
    if named is not None:
        name = shorten(named["name"])
        param = f"{where}.{name}" if where else name
        if named["how"].startswith("contains"):
            return InvalidRequestError(
                f"`{param}` is not a known field{_here(where, name, kind)}", param=param, code="unknown_field"
            )
        return InvalidRequestError(f"`{param}` is required", param=param, code="missing_required_field")
    if where == "type":
        return InvalidRequestError(
            f"unknown event type: {what.removeprefix('Invalid value ')}; known are response.create and response.cancel",
            param="type",
            code="unknown_event",
        )
    if not where:
        return InvalidRequestError(f"the message must be an object: {what}", code="invalid_type")
    possible = " or ".join(f"`{value}`" for value in choices(kind, where))
    if what.startswith("Invalid enum value"):
        wrong = what.removeprefix("Invalid enum value ").removeprefix("'").removesuffix("'")
        return InvalidRequestError(f"`{where}` must be {possible}, but is `{wrong}`", param=where)
    must = f" must be {possible}" if possible else ""
    code = "invalid_type" if "Expected" in what else None
    return InvalidRequestError(f"`{where}`{must}: {what}", param=where, code=code)


_SAME = (("max_output_tokens", "max_completion_tokens", "max_tokens"), ("input", "messages", "prompt"))
"""What each API has a name of its own for."""


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """A struct's fields and their types; of several structs, as events are, those of all."""
    kinds = [k for k in get_args(kind) or (kind,) if isinstance(k, type) and issubclass(k, msgspec.Struct)]
    return {field.name: field.type for k in reversed(kinds) for field in msgspec.structs.fields(k)}


def _here(where: str, name: str, kind: Any) -> str:
    """By which name, or where, ``kind`` has what was looked for in vain; empty if it has nothing like it."""
    fields = _fields(kind)
    if not where and name in _fields(DsparkOptions):
        return f"; here it is `dspark.{name}`"
    if where not in ("", "dspark"):
        return ""
    same = next((names for names in _SAME if name in names), (name,))
    found = next((known for known in same if known in fields), None)
    return f"; here it is `{found}`" + (", at the top of the body" if where else "") if found else ""


def choices(kind: Any, path: str) -> tuple[str, ...]:
    """The values that a field may have if it may have only a few; ``path``: as an error names it."""
    for name in path.split("."):
        kind = _fields(kind).get(name)
    return tuple(value for one in get_args(kind) if get_origin(one) is Literal for value in get_args(one))
