"""From a decoded body to a `Plan`: every value checked, every default filled in, nothing left to refuse but size.

Checks that need the prompt's tokens or the state of the server (room, earlier responses) are `service`'s.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from dspark_stream.errors import ContextLengthError, InvalidRequestError, NotFoundError
from dspark_stream.server.bodies import (
    ChatBody,
    ChatMessage,
    Content,
    DsparkOptions,
    InputMessage,
    ResponseBody,
    convert_item,
    refuse_unsupported,
)
from dspark_stream.types import (
    MAX_SEED,
    MAX_TEMPERATURE,
    GenerationRequest,
    Mode,
    ModelInfo,
    SamplingParams,
    Verification,
)

MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_MESSAGES = 2048
"""As many as OpenAI takes; each costs time on the loop, whatever is in it."""
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

Message = tuple[str, str]
"""(role, content), as `Tokenizer.encode_chat` takes them."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One response as it was asked for and found to be possible."""

    response_id: str
    model: str
    messages: tuple[Message, ...]
    """This turn's messages, without instructions and earlier turns."""
    input_param: str
    """What the client calls the prompt, for errors about it."""
    limit_param: str = "max_output_tokens"
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    max_chunk_gap_ms: float = 0.0
    mode: Mode = "dspark"
    verification: Verification = "rejection"
    steps: bool = False
    store: bool = True
    stream: bool = False
    include_usage: bool = False
    metadata: dict[str, str] = {}

    def conversation(self, earlier: Sequence[Message]) -> list[Message]:
        """Everything the model is to read, instructions first."""
        first: list[Message] = [("system", self.instructions)] if self.instructions else []
        return [*first, *earlier, *self.messages]

    def request(self, prompt_ids: Sequence[int], max_tokens: int) -> GenerationRequest:
        """The engine's form of it."""
        return GenerationRequest(
            request_id=self.response_id,
            prompt_ids=tuple(prompt_ids),
            sampling=SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                seed=self.seed,
                stop=self.stop,
                ignore_eos=self.ignore_eos,
            ),
            mode=self.mode,
            verification=self.verification,
            max_chunk_gap_ms=self.max_chunk_gap_ms,
            record_rounds=self.steps,
        )


def new_id(prefix: str) -> str:
    """An id that cannot be guessed: knowing one is what gives access to a stored response."""
    return f"{prefix}_{secrets.token_hex(16)}"


class Planner:
    """Checks bodies against one model's limits."""

    def __init__(self, info: ModelInfo, served_names: Sequence[str] = ()) -> None:
        self.info = info
        self.names = frozenset((info.model, *served_names))
        # For each field that a request leaves out, by itself: a temperature of the request's own leaves top-p and top-k
        # as the model's makers recommend them.
        self._temperature = 1.0 if info.sampling.temperature is None else info.sampling.temperature
        self._top_p = 1.0 if info.sampling.top_p is None else info.sampling.top_p
        self._default_top_k = min(info.sampling.top_k or 0, info.vocab_size)

    def response(self, body: ResponseBody) -> Plan:
        """Plan for a ``response.create`` event or a body of ``POST /v1/responses``.

        Raises:
            InvalidRequestError: naming the field and its limit.
            ContextLengthError: the prompt cannot fit, whatever its tokens are.
            NotFoundError: an unknown model.
        """
        refuse_unsupported(body)
        extra = body.dspark or DsparkOptions()
        if body.stream_options is not None:
            _refuse_stream_options(body.stream_options, usage=False)
        plan = Plan(
            response_id=new_id("resp"),
            model=self._model(body.model),
            messages=_input_messages(body.input),
            input_param="input",
            instructions=body.instructions,
            previous_response_id=body.previous_response_id,
            max_output_tokens=self._max_tokens(body.max_output_tokens, "max_output_tokens"),
            temperature=_ranged(body.temperature, "temperature", 0, MAX_TEMPERATURE, default=self._temperature),
            top_p=_ranged(body.top_p, "top_p", 0, 1, default=self._top_p, low_open=True),
            top_k=self._top_k(extra.top_k, "dspark.top_k"),
            min_p=_ranged(extra.min_p, "dspark.min_p", 0, 1, default=0.0),
            seed=_seed(extra.seed, "dspark.seed"),
            stop=_stop(extra.stop, "dspark.stop"),
            ignore_eos=extra.ignore_eos,
            max_chunk_gap_ms=_ranged(extra.max_chunk_gap_ms, "dspark.max_chunk_gap_ms", 0, 600_000, default=0.0),
            mode=extra.mode,
            verification=extra.verification,
            steps=extra.steps,
            store=body.store is not False,
            stream=bool(body.stream),
            metadata=_metadata(body.metadata),
        )
        self.refuse_oversized(plan.conversation(()), plan.input_param)
        return plan

    def chat(self, body: ChatBody) -> Plan:
        """Plan for a body of ``POST /v1/chat/completions``; raises as `response`."""
        refuse_unsupported(body)
        extra = body.dspark or DsparkOptions()
        options = body.stream_options
        if options is not None:
            if not body.stream:
                raise InvalidRequestError("`stream_options` needs `stream: true`", param="stream_options")
            _refuse_stream_options(options, usage=True)
        limit_param = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        # vLLM's clients write -1 for "off".
        top_k = 0 if body.top_k == -1 else body.top_k
        plan = Plan(
            response_id=new_id("chatcmpl"),
            model=self._model(body.model),
            messages=_chat_messages(body.messages),
            input_param="messages",
            limit_param=limit_param,
            max_output_tokens=self._max_tokens(limit, limit_param),
            temperature=_ranged(body.temperature, "temperature", 0, MAX_TEMPERATURE, default=self._temperature),
            top_p=_ranged(body.top_p, "top_p", 0, 1, default=self._top_p, low_open=True),
            top_k=self._top_k(*_either(top_k, "top_k", extra.top_k)),
            min_p=_ranged(*_either(body.min_p, "min_p", extra.min_p), 0, 1, default=0.0),
            seed=_seed(*_either(body.seed, "seed", extra.seed)),
            stop=_stop(*_either(body.stop, "stop", extra.stop)),
            ignore_eos=bool(body.ignore_eos) or extra.ignore_eos,
            max_chunk_gap_ms=_ranged(extra.max_chunk_gap_ms, "dspark.max_chunk_gap_ms", 0, 600_000, default=0.0),
            mode=extra.mode,
            verification=extra.verification,
            store=False,
            stream=bool(body.stream),
            include_usage=options is not None and bool(options.include_usage),
            metadata=_metadata(body.metadata),
        )
        self.refuse_oversized(plan.conversation(()), plan.input_param)
        return plan

    def _model(self, name: str | None) -> str:
        if name is not None and name not in self.names:
            raise NotFoundError(
                f"the model `{name[:200]}` does not exist; this server has `{self.info.model}`",
                param="model",
                code="model_not_found",
            )
        return name if name is not None else self.info.model

    def _max_tokens(self, value: int | None, param: str) -> int | None:
        # One token of the context is the least that a prompt takes.
        high = self.info.max_model_len - 1
        if value is not None and not 1 <= value <= high:
            raise InvalidRequestError(f"`{param}` must be from 1 to {high}, but is {_number(value)}", param=param)
        return value

    def _top_k(self, value: int | None, param: str) -> int:
        if value is not None and not 0 <= value <= self.info.vocab_size:
            raise InvalidRequestError(
                f"`{param}` must be from 0 (off) to {self.info.vocab_size}, but is {_number(value)}", param=param
            )
        return self._default_top_k if value is None else value

    def refuse_oversized(self, messages: Sequence[Message], param: str) -> None:
        """Raise for a prompt that is too long whatever its tokens are; costs no tokenising."""
        most = self.info.max_model_len * self.info.max_token_bytes
        size = 0
        for _, content in messages:
            size += len(content) if content.isascii() else len(content.encode())
            if size > most:
                raise ContextLengthError(
                    f"`{param}` has more than {most} bytes, which cannot fit the context of "
                    f"{self.info.max_model_len} tokens",
                    param=param,
                )

    def room(self, plan: Plan, prompt_tokens: int, default: int) -> int:
        """How many tokens may be written after a prompt of this length."""
        context = self.info.max_model_len
        room = context - prompt_tokens
        if room < 1:
            raise ContextLengthError(
                f"`{plan.input_param}` is at least {prompt_tokens} tokens long, but the context is {context} tokens "
                "and one must be left for the answer",
                param=plan.input_param,
            )
        wanted = plan.max_output_tokens
        if wanted is not None and wanted > room:
            raise ContextLengthError(
                f"`{plan.limit_param}` is {wanted}, but after a prompt of {prompt_tokens} tokens the context of "
                f"{context} has room for {room}",
                param=plan.limit_param,
            )
        return wanted if wanted is not None else min(default, room)


# --- messages ---------------------------------------------------------------------------------------------------


def _input_messages(value: str | list[dict[str, Any]] | None) -> tuple[Message, ...]:
    if value is None:
        raise InvalidRequestError("`input` is required", param="input", code="missing_required_field")
    if isinstance(value, str):
        return _not_empty([("user", value)], "input")
    _not_too_many(value, "input")
    messages = []
    for index, item in enumerate(value):
        message = convert_item(item, InputMessage, f"input[{index}]")
        messages.append((_role(message.role), _text(message.content)))
    return _not_empty(messages, "input")


def _chat_messages(value: list[dict[str, Any]]) -> tuple[Message, ...]:
    _not_too_many(value, "messages")
    messages = []
    for index, item in enumerate(value):
        path = f"messages[{index}]"
        message = convert_item(item, ChatMessage, path)
        refuse_unsupported(message, prefix=path + ".")
        if message.content is None:
            raise InvalidRequestError(
                f"`{path}.content` is required", param=f"{path}.content", code="missing_required_field"
            )
        messages.append((_role(message.role), _text(message.content)))
    return _not_empty(messages, "messages")


def _not_too_many(messages: Sequence[object], param: str) -> None:
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"`{param}` has {len(messages)} messages; at most {MAX_MESSAGES}", param=param)


def _not_empty(messages: list[Message], param: str) -> tuple[Message, ...]:
    if not any(content for _, content in messages):
        raise InvalidRequestError(f"`{param}` is empty; it needs some text", param=param, code="empty_input")
    return tuple(messages)


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


# --- values -----------------------------------------------------------------------------------------------------


def _either(value: Any, param: str, extra: Any) -> tuple[Any, str]:
    """A field that has two homes in the chat API: at the top, as vLLM, or in ``dspark``."""
    return (value, param) if value is not None else (extra, f"dspark.{param}")


def _ranged(
    value: float | None, param: str, low: float, high: float, *, default: float, low_open: bool = False
) -> float:
    if value is None:
        return default
    # NaN fails every comparison; MessagePack can carry one.
    if not (math.isfinite(value) and low <= value <= high) or (low_open and value == low):
        begin = f"above {low}" if low_open else f"from {low}"
        raise InvalidRequestError(f"`{param}` must be {begin} to {high}, but is {value}", param=param)
    return value


def _number(value: int) -> str:
    return str(value) if abs(value) < 10**24 else "out of any range"


def _seed(value: int | None, param: str) -> int:
    if value is None:
        return secrets.randbits(63)
    if not 0 <= value <= MAX_SEED:
        raise InvalidRequestError(f"`{param}` must be from 0 to 2^63 - 1, but is {_number(value)}", param=param)
    return value


def _stop(value: str | list[str] | None, param: str) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else tuple(value)
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"`{param}` has {len(strings)} strings; at most {MAX_STOP_STRINGS}", param=param)
    for index, text in enumerate(strings):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            where = param if isinstance(value, str) else f"{param}[{index}]"
            raise InvalidRequestError(
                f"`{where}` must be 1 to {MAX_STOP_CHARS} characters long, but has {len(text)}", param=where
            )
    return strings


def _metadata(value: dict[str, str] | None) -> dict[str, str]:
    pairs = value or {}
    if len(pairs) > MAX_METADATA_PAIRS:
        raise InvalidRequestError(f"`metadata` has {len(pairs)} pairs; at most {MAX_METADATA_PAIRS}", param="metadata")
    for key, text in pairs.items():
        if len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE:
            raise InvalidRequestError(
                f"`metadata`: keys have at most {MAX_METADATA_KEY} characters and values {MAX_METADATA_VALUE}",
                param="metadata",
            )
    return pairs


def _refuse_stream_options(options: Any, *, usage: bool) -> None:
    if options.include_obfuscation:
        raise InvalidRequestError(
            "`stream_options.include_obfuscation`: events are not padded",
            param="stream_options.include_obfuscation",
            code="unsupported_value",
        )
    if options.continuous_usage_stats or (options.include_usage is not None and not usage):
        name = "continuous_usage_stats" if options.continuous_usage_stats else "include_usage"
        raise InvalidRequestError(
            f"`stream_options.{name}` is not supported here", param=f"stream_options.{name}", code="unsupported_value"
        )
