"""From a decoded body to a `Plan`: every value checked, every default filled in, nothing left to refuse but size.

Checks that need the prompt's tokens or the state of the server (room, earlier responses) are `service`'s.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from dspark_stream import __version__
from dspark_stream.errors import ContextLengthError, InvalidRequestError, NotFoundError
from dspark_stream.server import values
from dspark_stream.server.bodies import Body, ChatBody, CompletionBody, DsparkOptions, ResponseBody
from dspark_stream.server.messages import chat_messages, input_messages
from dspark_stream.server.refusals import refuse_unsupported, unsupported
from dspark_stream.types import (
    RANGES,
    GenerationRequest,
    Message,
    Mode,
    ModelInfo,
    Range,
    SamplingParams,
    Verification,
)

_GAP_MS = Range(0, 600_000)
LEGACY_MAX_TOKENS = 16
"""What /v1/completions means by no `max_tokens`, at OpenAI and vLLM."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One response as it was asked for and found to be possible."""

    response_id: str
    model: str
    fingerprint: str = ""
    """Names the model and how it is computed; answers carry it as ``system_fingerprint``."""
    messages: tuple[Message, ...] = ()
    """This turn's messages, without instructions and earlier turns."""
    prompt: str | tuple[int, ...] | None = None
    """Text or token ids to go on with, no chat template applied; None where there are messages."""
    input_param: str
    """What the client calls the prompt, for errors about it."""
    limit_param: str = "max_output_tokens"
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    """As asked for: `values.UNLIMITED` is all that fit, and what does not fit is cut."""
    default_max_tokens: int | None = None
    """In place of the service's own."""
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    """0: the likeliest token, whatever the temperature."""
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_chunk_gap_ms: float = 0.0
    mode: Mode = "dspark"
    verification: Verification = "rejection"
    steps: bool = False
    generate: bool = True
    """False: only keep the conversation, for a next response to go on with."""
    store: bool = True
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
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
                min_tokens=min(self.min_tokens, max_tokens),
                temperature=self.temperature if self.top_p else 0.0,
                top_p=self.top_p or 1.0,
                top_k=self.top_k,
                min_p=self.min_p,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=self.logit_bias,
                seed=self.seed,
                stop=self.stop,
                stop_token_ids=self.stop_token_ids,
                ignore_eos=self.ignore_eos,
            ),
            mode=self.mode,
            verification=self.verification,
            max_chunk_gap_ms=self.max_chunk_gap_ms,
            record_rounds=self.steps,
        )

    def warnings(self, sampling: SamplingParams) -> list[str]:
        """Where the engine was asked for something else than the client wrote, in words."""
        found = []
        for param, wanted, taken in (
            (self.limit_param, self.max_output_tokens, sampling.max_tokens),
            ("min_tokens", self.min_tokens, sampling.min_tokens),
        ):
            if wanted is not None and wanted != taken:
                found.append(f"`{param}` is {values.number(wanted)}; the context has room for {taken}, which was taken")
        return found


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
        self.fingerprint = _fingerprint(info)

    def response(self, body: ResponseBody, *, events: bool = True) -> Plan:
        """Plan for a ``response.create`` event or a body of ``POST /v1/responses``; ``events``: the answer is sent as
        such.

        Raises:
            InvalidRequestError: naming the field and its limit.
            ContextLengthError: the prompt cannot fit, whatever its tokens are.
            NotFoundError: an unknown model.
        """
        refuse_unsupported(body)
        if not events:
            _refuse_steps(body)
        generate = body.generate is not False
        return self._plan(
            body,
            "resp",
            ("max_output_tokens", body.max_output_tokens),
            streams=True,
            messages=input_messages(body.input, required=generate),
            input_param="input",
            instructions=body.instructions,
            previous_response_id=body.previous_response_id,
            generate=generate,
            store=body.store is not False,
        )

    def chat(self, body: ChatBody) -> Plan:
        """Plan for a body of ``POST /v1/chat/completions``; raises as `response`."""
        refuse_unsupported(body)
        _refuse_steps(body)
        limit = ("max_tokens", body.max_tokens)
        if body.max_completion_tokens is not None:
            limit = ("max_completion_tokens", body.max_completion_tokens)
        return self._plan(
            body,
            "chatcmpl",
            limit,
            streams=bool(body.stream),
            messages=chat_messages(body.messages),
            input_param="messages",
            store=False,
        )

    def completion(self, body: CompletionBody) -> Plan:
        """Plan for a body of ``POST /v1/completions``; raises as `response`."""
        refuse_unsupported(body, but=("prompt",))
        _refuse_steps(body)
        return self._plan(
            body,
            "cmpl",
            ("max_tokens", body.max_tokens),
            streams=bool(body.stream),
            prompt=self._prompt(body.prompt),
            input_param="prompt",
            default_max_tokens=LEGACY_MAX_TOKENS,
            store=False,
        )

    def _plan(self, body: Body, prefix: str, limit: tuple[str, int | None], *, streams: bool, **own: Any) -> Plan:
        """What all APIs have in common, and what is a request's ``own``."""
        extra = body.dspark or DsparkOptions()
        options = values.stream_options(body.stream_options, streams=streams)
        limit_param, max_tokens = limit[0], values.max_tokens(limit[1], limit[0])

        def ranged(value: float | None, param: str, default: float = 0.0) -> float:
            return values.ranged(value, param, RANGES[param.removeprefix("dspark.")], default=default)

        seed, chosen = values.seed(*values.either(body.seed, "seed", extra.seed))
        plan = Plan(
            response_id=new_id(prefix),
            model=self._model(body.model),
            fingerprint=self.fingerprint,
            limit_param=limit_param,
            max_output_tokens=max_tokens,
            min_tokens=values.min_tokens(body.min_tokens, max_tokens, limit_param),
            temperature=ranged(body.temperature, "temperature", default=self._temperature),
            top_p=values.ranged(body.top_p, "top_p", RANGES["top_p"]._replace(low_open=False), default=self._top_p),
            top_k=values.top_k(
                *values.either(body.top_k, "top_k", extra.top_k), self.info.vocab_size, self._default_top_k
            ),
            min_p=ranged(*values.either(body.min_p, "min_p", extra.min_p)),
            frequency_penalty=ranged(body.frequency_penalty, "frequency_penalty"),
            presence_penalty=ranged(body.presence_penalty, "presence_penalty"),
            repetition_penalty=ranged(body.repetition_penalty, "repetition_penalty", default=1.0),
            logit_bias=values.logit_bias(body.logit_bias, self.info.vocab_size),
            seed=seed,
            stop=values.stop(*values.either(body.stop, "stop", extra.stop)),
            stop_token_ids=values.token_ids(
                body.stop_token_ids, "stop_token_ids", self.info.vocab_size, most=values.MAX_STOP_TOKENS
            ),
            ignore_eos=bool(values.either(body.ignore_eos, "ignore_eos", extra.ignore_eos)[0]),
            max_chunk_gap_ms=values.ranged(extra.max_chunk_gap_ms, "dspark.max_chunk_gap_ms", _GAP_MS, default=0.0),
            mode=extra.mode or "dspark",
            # Rejection's text depends on where its rounds end, and so on the load; who chooses a seed wants it again.
            verification=extra.verification or ("coupled" if chosen else "rejection"),
            steps=bool(extra.steps),
            stream=bool(body.stream),
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
            metadata=values.metadata(body.metadata),
            **own,
        )
        said: list[Message] = [("", plan.prompt)] if isinstance(plan.prompt, str) else plan.conversation(())
        self.refuse_oversized(said, plan.input_param)
        return plan

    def _prompt(self, value: str | list[Any] | None) -> str | tuple[int, ...]:
        """A text, or token ids; a list of one of these is that one."""
        if isinstance(value, list) and value and isinstance(value[0], str | list):
            if len(value) > 1:
                raise InvalidRequestError(
                    f"`prompt` has {len(value)} prompts; a request has one, and requests are decoded together",
                    param="prompt",
                    code="unsupported_value",
                )
            value = value[0]
        if not value:
            raise InvalidRequestError(
                "`prompt` is empty; it needs some text, or token ids", param="prompt", code="empty_input"
            )
        if not isinstance(value, str):
            if len(value) >= self.info.max_model_len:
                raise self.too_long(f"your `prompt` has {len(value)} tokens, and the answer needs one", "prompt")
            return values.token_ids(value, "prompt", self.info.vocab_size)
        return value

    def _model(self, name: str | None) -> str:
        if name is not None and name not in self.names:
            raise NotFoundError(
                f"the model `{name[:200]}` does not exist; this server has `{self.info.model}`",
                param="model",
                code="model_not_found",
            )
        return name if name is not None else self.info.model

    def refuse_oversized(self, messages: Sequence[Message], param: str) -> None:
        """Raise for a prompt that is too long whatever its tokens are; costs no tokenising."""
        most = self.info.max_model_len * self.info.max_token_bytes
        size = 0
        for _, said in messages:
            for text in (said,) if isinstance(said, str) else said:
                size += len(text) if text.isascii() else len(text.encode())
            if size > most:
                raise self.too_long(f"your `{param}` has more than {most} bytes, which cannot be so few tokens", param)

    def room(self, plan: Plan, prompt_tokens: int, default: int) -> int:
        """How many tokens may be written after a prompt of this length: what was asked for, as far as it fits."""
        room = self.info.max_model_len - prompt_tokens
        if room < 1:
            raise self.too_long(
                f"your `{plan.input_param}` resulted in at least {prompt_tokens} tokens, and the answer needs one",
                plan.input_param,
            )
        wanted = plan.max_output_tokens
        if wanted is None:
            wanted = max(plan.default_max_tokens or default, plan.min_tokens)
        return room if wanted == values.UNLIMITED else min(wanted, room)

    def too_long(self, however: str, param: str | None) -> ContextLengthError:
        """The error in the words by which clients know it: of all that it says, some see the text alone."""
        return ContextLengthError(
            f"This model's maximum context length is {self.info.max_model_len} tokens. However, {however}. Please "
            f"reduce the length of the prompt ({ContextLengthError.code}).",
            param=param,
        )


def _refuse_steps(body: Body) -> None:
    """Raise where rounds were asked for and the answer has no room for them."""
    if body.dspark is not None and body.dspark.steps:
        raise unsupported(
            "dspark.steps",
            "rounds are told in events of /v1/responses; ask there, over a WebSocket or with `stream: true`",
        )


def _fingerprint(info: ModelInfo) -> str:
    """The same as long as a seed gives the same text; what a file of weights holds is not looked at."""
    what = (__version__, info.model, info.dtype, info.device, info.target_quant, info.vocab_size)
    return f"fp_{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"
