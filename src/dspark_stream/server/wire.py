"""What the server says: every event as a struct, with the names and shapes of the Responses API, in two encodings.

Fields are in the order in which they are written. ``sequence_number`` is set when an event is about to be written
(see `outbox`), so that merged events leave no gap.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from dspark_stream.errors import BusyError, DsparkError, EngineFailedError, InternalError, ShutdownError
from dspark_stream.server.bodies import Encoding
from dspark_stream.types import ErrorInfo, RecommendedSampling, Source, Usage

JSON_PROTOCOL = "dspark.v1+json"
MSGPACK_PROTOCOL = "dspark.v1+msgpack"
PROTOCOLS: dict[str, Encoding] = {JSON_PROTOCOL: "json", MSGPACK_PROTOCOL: "msgpack"}

# --- parts of a response ---------------------------------------------------------------------------------------


class OutputTextPart(msgspec.Struct, tag="output_text", tag_field="type", kw_only=True):
    """The one content part of the answer."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(msgspec.Struct, tag="message", tag_field="type", kw_only=True):
    """The one output item of the answer."""

    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputTextPart] = []


class InputTokensDetails(msgspec.Struct, kw_only=True):
    """Of the prompt's tokens."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    """Of the answer's tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Tokens of a finished response."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokensDetails = msgspec.field(default_factory=InputTokensDetails)
    output_tokens_details: OutputTokensDetails = msgspec.field(default_factory=OutputTokensDetails)


class ResponseError(msgspec.Struct, kw_only=True):
    """Why a response failed."""

    code: str
    message: str
    type: str
    param: str | None = None


class IncompleteDetails(msgspec.Struct, kw_only=True):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class DsparkStats(msgspec.Struct, kw_only=True):
    """What was used, and how speculation went; fields of a response that is not finished are absent."""

    mode: str
    verification: str
    seed: int
    max_tokens: int | UnsetType = UNSET
    """The limit that the engine was given."""
    warnings: list[str] | UnsetType = UNSET
    """In what the engine was asked for something else than the client wrote; absent: in nothing."""
    rounds: int | UnsetType = UNSET
    drafted: int | UnsetType = UNSET
    scheduled: int | UnsetType = UNSET
    accepted: int | UnsetType = UNSET
    accepted_per_position: list[int] | UnsetType = UNSET
    accepted_length: float | UnsetType = UNSET
    queue_ms: float | UnsetType = UNSET
    prefill_ms: float | UnsetType = UNSET
    decode_ms: float | UnsetType = UNSET


class ResponseObject(msgspec.Struct, tag="response", tag_field="object", kw_only=True):
    """A response, as it is at one moment."""

    id: str
    created_at: float
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    system_fingerprint: str
    output: list[OutputMessage]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    previous_response_id: str | None
    temperature: float
    top_p: float
    store: bool
    dspark: DsparkStats
    completed_at: float | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    background: bool = False
    parallel_tool_calls: bool = True
    text: dict[str, Any] = msgspec.field(default_factory=lambda: {"format": {"type": "text"}})
    tool_choice: str = "auto"
    tools: list[Any] = []
    top_logprobs: int = 0
    truncation: str = "disabled"


# --- events ------------------------------------------------------------------------------------------------------


class _Event(msgspec.Struct, tag_field="type", kw_only=True):
    sequence_number: int = 0
    stream_id: str | UnsetType = UNSET


class ResponseEvent(_Event, kw_only=True):
    """An event that carries the whole response."""

    response: ResponseObject


class Created(ResponseEvent, tag="response.created", kw_only=True):
    """The response exists; its id is known."""


class InProgress(ResponseEvent, tag="response.in_progress", kw_only=True):
    """The engine has it."""


class Completed(ResponseEvent, tag="response.completed", kw_only=True):
    """Terminal: the model, or a stop string, ended the text."""


class Incomplete(ResponseEvent, tag="response.incomplete", kw_only=True):
    """Terminal: cut at ``max_output_tokens``."""


class Failed(ResponseEvent, tag="response.failed", kw_only=True):
    """Terminal: ``response.error`` says why."""


class Cancelled(ResponseEvent, tag="response.cancelled", kw_only=True):
    """Terminal: the client ended it."""


class OutputItemAdded(_Event, tag="response.output_item.added", kw_only=True):
    """The message begins."""

    output_index: int
    item: OutputMessage


class OutputItemDone(_Event, tag="response.output_item.done", kw_only=True):
    """The message ends."""

    output_index: int
    item: OutputMessage


class _PartEvent(_Event, kw_only=True):
    item_id: str
    output_index: int = 0
    content_index: int = 0


class ContentPartAdded(_PartEvent, tag="response.content_part.added", kw_only=True):
    """The text begins."""

    part: OutputTextPart


class ContentPartDone(_PartEvent, tag="response.content_part.done", kw_only=True):
    """The text ends."""

    part: OutputTextPart


class TextDelta(_PartEvent, tag="response.output_text.delta", kw_only=True):
    """Text of one verification round, or of several where the reader is slow."""

    delta: str
    logprobs: list[Any] = []
    usage: ResponseUsage | UnsetType = UNSET
    """Up to here, where ``stream_options.continuous_usage_stats`` asks for it."""


class TextDone(_PartEvent, tag="response.output_text.done", kw_only=True):
    """The whole text."""

    text: str
    logprobs: list[Any] = []


TerminalEvent = Completed | Incomplete | Failed | Cancelled


class ErrorBody(msgspec.Struct, kw_only=True):
    """The OpenAI error object."""

    type: str
    code: str
    message: str
    param: str | None = None


class ErrorEvent(msgspec.Struct, tag="error", tag_field="type", kw_only=True):
    """A client event was refused. It belongs to no response; its number is always 0."""

    status: int
    error: ErrorBody
    sequence_number: int = 0
    event_id: str | UnsetType = UNSET
    stream_id: str | UnsetType = UNSET
    retry_after_s: int | UnsetType = UNSET


class Step(msgspec.Struct, tag="dspark:step", tag_field="type", kw_only=True):
    """One verification round. Unnumbered: a client that skips extension events must see no gap."""

    response_id: str
    stream_id: str | UnsetType = UNSET
    start: int
    drafted: int
    scheduled: int
    accepted: int
    bonus: int
    source: Source
    confidence: list[float]
    survival: list[float]
    text: str
    pieces: list[tuple[str, bool]]
    t_draft_ms: float
    t_verify_ms: float
    batch_tokens: int
    streams: int


class HelloLimits(msgspec.Struct, kw_only=True):
    """What a client should stay within."""

    max_model_len: int
    max_num_seqs: int
    max_queue: int
    max_message_bytes: int
    max_lanes: int
    max_lane_queue: int
    max_streams_per_client: int


class Hello(msgspec.Struct, tag="dspark:hello", tag_field="type", kw_only=True):
    """First on every socket."""

    version: str
    protocol: str
    model: str
    drafter: str | None
    gamma: int
    schedule: str
    sampling: RecommendedSampling
    """What is taken where a request says nothing; null: temperature 1, top-p 1, top-k off."""
    limits: HelloLimits


NumberedEvent = (
    Created
    | InProgress
    | OutputItemAdded
    | ContentPartAdded
    | TextDelta
    | TextDone
    | ContentPartDone
    | OutputItemDone
    | TerminalEvent
)
ServerEvent = NumberedEvent | ErrorEvent | Step | Hello


def event_type(event: ServerEvent) -> str:
    """The event's ``type`` as it is written."""
    tag = type(event).__struct_config__.tag
    assert isinstance(tag, str)  # every event above has one
    return tag


# --- errors ------------------------------------------------------------------------------------------------------


def error_body(error: DsparkError) -> ErrorBody:
    """An error as clients see it."""
    return ErrorBody(type=error.type, code=error.code, message=error.message, param=error.param)


def error_event(error: DsparkError, *, event_id: object = None, stream_id: object = None) -> ErrorEvent:
    """An error as an event; ids that are not usable text are left out."""
    return ErrorEvent(
        status=error.status,
        error=error_body(error),
        event_id=event_id[:MAX_ID_CHARS] if isinstance(event_id, str) else UNSET,
        stream_id=stream_id[:MAX_ID_CHARS] if isinstance(stream_id, str) else UNSET,
        retry_after_s=error.retry_after_s if isinstance(error, BusyError) else UNSET,
    )


def error_info(error: DsparkError) -> ErrorInfo:
    """An error as the engine's events carry it."""
    return ErrorInfo(status=error.status, type=error.type, code=error.code, message=error.message, param=error.param)


def as_dspark_error(error: BaseException) -> DsparkError:
    """The error itself if clients may see it, else one that tells nothing about our insides."""
    return error if isinstance(error, DsparkError) else InternalError("the server failed on this request")


CUT_SHORT = frozenset({ShutdownError.code, EngineFailedError.code})
"""Codes of answers that ended before the model did, and would have gone on elsewhere."""


def response_error(info: ErrorInfo) -> ResponseError:
    """``code`` is one that the Responses API knows, or says that it was not the request: `CUT_SHORT`. What exactly
    happened is in ``type`` and ``message``."""
    code = "server_error" if info.status >= 500 else "invalid_prompt"
    if info.code in CUT_SHORT:
        code = info.code
    if info.status == 429:
        code = "rate_limit_exceeded"
    return ResponseError(code=code, message=info.message, type=info.type, param=info.param)


MAX_ID_CHARS = 128

# --- usage and encodings -----------------------------------------------------------------------------------------


def response_usage(usage: Usage) -> ResponseUsage:
    """Tokens in the Responses API's words."""
    return usage_so_far(usage.input_tokens, usage.output_tokens)


def usage_so_far(input_tokens: int, output_tokens: int) -> ResponseUsage:
    """The same of a response that goes on."""
    return ResponseUsage(
        input_tokens=input_tokens, output_tokens=output_tokens, total_tokens=input_tokens + output_tokens
    )


_JSON = msgspec.json.Encoder()
_MSGPACK = msgspec.msgpack.Encoder()


def encode(message: object, encoding: Encoding = "json") -> bytes:
    """One frame, or one body."""
    return _JSON.encode(message) if encoding == "json" else _MSGPACK.encode(message)
