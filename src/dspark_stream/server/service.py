"""What every request needs, whatever socket it came by: admit, tokenise, submit, and take back when it is over."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import msgspec

from dspark_stream.engine.boundary import Engine, Tokenizer
from dspark_stream.errors import (
    ContextLengthError,
    DsparkError,
    EngineFailedError,
    InternalError,
    InvalidRequestError,
)
from dspark_stream.server import access, wire
from dspark_stream.server.admission import Admission, Held
from dspark_stream.server.bodies import most_values
from dspark_stream.server.conversation import ConversationStore
from dspark_stream.server.hub import EventHub
from dspark_stream.server.metrics import Metrics
from dspark_stream.server.plan import Plan, Planner
from dspark_stream.server.settings import ServerConfig
from dspark_stream.server.turns import Turns
from dspark_stream.server.vitals import Vitals
from dspark_stream.types import EngineEvent, FinishedEvent, GenerationRequest, Message, TokensEvent, Usage

log = logging.getLogger(__name__)

STREAM_BYTES = 48 << 10
"""What a stream takes that waits, with its connection and without its prompt; measured: 45 kB."""
LONG_TEXT = 32 << 10
"""From so many characters on a prompt waits in a line of its own: a megabyte of one letter can take seconds."""
TOKEN_BYTES = 48
"""Of a prompt: a Python integer, and where it stands in a list and in a tuple."""


class Listener(Protocol):
    """Who is told about a stream. Both are called on the loop and must not block."""

    def started(self, taken: GenerationRequest | None) -> None:
        """The engine has ``taken`` the request, or (None) does not need to; events follow."""

    def engine_event(self, event: EngineEvent) -> None:
        """One event, the `FinishedEvent` last."""


class Service:
    """Shared by all sockets of one application."""

    def __init__(self, config: ServerConfig, engine: Engine, tokenizer: Tokenizer) -> None:
        self.config = config
        self.engine = engine
        self.info = engine.info
        self.most_values = most_values(engine.info.max_model_len)
        """Of a message."""
        self.planner = Planner(engine.info, config.served_names)
        places = engine.info.max_num_seqs + config.max_queue
        self.admission = Admission(places, config.max_streams_per_client, config.queue_memory)
        self.store = ConversationStore(config.store_max_responses, config.store_max_bytes)
        self.metrics = Metrics()
        self.hub = EventHub(asyncio.get_running_loop())
        self.vitals = Vitals(engine, self._engine_failed)
        self.started_at = time.time()
        self.idle = asyncio.Event()
        """Set while no stream is in flight."""
        self.idle.set()
        self._tokenizer = tokenizer
        self._turns = Turns(config.tokenizer_threads, "dspark-tokenize")
        self._long_turns = Turns(1, "dspark-tokenize-long")

    @property
    def draining(self) -> bool:
        """Whether the service is going down."""
        return self.admission.draining

    def hold(self, plan: Plan, client: str) -> Held:
        """The memory of a request, from when it is there on: it may have to wait for its turn before `run`.

        Raises:
            RateLimitError, OverloadedError: there is not so much left, for this client or for anybody.
        """
        held = self.admission.holding(client)
        held.grow(STREAM_BYTES + _size(_texts(plan, plan.conversation(()))))
        return held

    async def run(
        self, plan: Plan, client: str, listener: Listener, *, owner: object = None, memory: Held | None = None
    ) -> None:
        """One stream from admission to its end; cancelling this task cancels the stream.

        Args:
            owner: for whom what is not to be stored is kept: a socket can go on with its own responses.
            memory: what `hold` took for it; given back at the end.

        Raises:
            DsparkError: refused; ``listener`` has heard nothing.
        """
        arrived = time.monotonic()
        with self._place(client), memory or self.hold(plan, client) as held:
            earlier = self.store.get(plan.previous_response_id, owner)
            conversation = plan.conversation(earlier)
            self.planner.refuse_oversized(conversation, plan.input_param)
            held.grow(_size(_parts(earlier)))
            if not plan.generate:
                self.keep(plan, [*earlier, *plan.messages], owner)
                entry = access.current()
                entry.response_id, entry.reason = plan.response_id, "stop"
                self.metrics.finished["stop"] += 1
                listener.started(None)
                nothing = Usage(input_tokens=0, output_tokens=0)
                listener.engine_event(FinishedEvent(request_id=plan.response_id, reason="stop", usage=nothing))
                return
            prompt_ids = await self._tokenise(plan, conversation, client)
            held.grow(TOKEN_BYTES * len(prompt_ids))
            self.admission.check()
            limit = self.planner.room(plan, len(prompt_ids), self.config.default_max_output_tokens)
            stream = _Stream(self, plan, [*earlier, *plan.messages], listener, arrived, owner)
            self.hub.subscribe(plan.response_id, stream.receive)
            taken = None
            try:
                taken = self._submit(plan, prompt_ids, limit, client)
                stream.entry.submitted(plan.response_id, len(prompt_ids))
                listener.started(taken)
                await stream.over.wait()
            finally:
                self.hub.unsubscribe(plan.response_id)
                if taken is not None:
                    self._account(plan.response_id, stream)

    def _account(self, response_id: str, stream: _Stream) -> None:
        """Book a stream that the engine had, and take it back if it is not over."""
        entry = stream.entry
        if not stream.over.is_set():
            # The client has gone, and nobody will hear the engine's answer to this.
            self.engine.cancel(response_id)
            self.metrics.finished["cancelled"] += 1
            entry.reason = "cancelled"
        if entry.key_label:
            self.metrics.of_client(entry.key_label, entry.input_tokens, entry.output_tokens)

    def keep(self, plan: Plan, messages: list[Message], owner: object) -> None:
        """Store a conversation for everybody who knows its id, or for its owner alone, or not at all."""
        if plan.store or owner is not None:
            self.store.put(plan.response_id, messages, None if plan.store else owner)

    def _submit(self, plan: Plan, prompt_ids: list[int], limit: int, client: str) -> GenerationRequest:
        whose = _digest(client) if self.admission.shared else ""
        request = msgspec.structs.replace(plan.request(prompt_ids, limit), client=whose)
        try:
            self.engine.submit(request)
        except InvalidRequestError as error:
            # The engine has its own words for two fields that each API calls differently.
            limit_param, input_param = plan.limit_param, plan.input_param
            words = {"max_tokens": limit_param, "prompt_ids": input_param}
            param = words.get(error.param or "", error.param)
            if isinstance(error, ContextLengthError):
                raise self.planner.too_long(error.message, param) from None
            raise type(error)(error.message, param=param, code=error.code) from None
        return request

    @contextmanager
    def _place(self, client: str) -> Iterator[None]:
        try:
            with self.admission.place(client):
                self.idle.clear()
                yield
        finally:
            if not self.admission.in_flight:
                self.idle.set()

    async def _tokenise(self, plan: Plan, conversation: list[Message], client: str) -> list[int]:
        prompt, param, most = plan.prompt, plan.input_param, self.info.max_model_len
        if isinstance(prompt, tuple):
            return list(prompt)
        tokenizer = self._tokenizer
        turns = self._turns if sum(map(len, _texts(plan, conversation))) < LONG_TEXT else self._long_turns
        try:
            if prompt is not None:
                return await turns.run(client, lambda: tokenizer.encode_prompt(prompt, most))
            return await turns.run(client, lambda: tokenizer.encode_chat(conversation, most))
        except InvalidRequestError as error:
            # A template may refuse an order of roles; which field they came in is ours to say.
            raise InvalidRequestError(error.message, param=param, code=error.code) from None
        except DsparkError:
            raise
        except Exception:
            log.exception("the tokenizer failed")
            raise InternalError("the prompt could not be tokenised") from None

    def _engine_failed(self, error: EngineFailedError) -> None:
        self.admission.failure = error.message
        # What the engine itself still had to say is on its way to the loop, and comes first.
        asyncio.get_running_loop().call_soon(self.hub.end_all, wire.error_info(error))

    def refused(self, error: DsparkError) -> None:
        """Count a refusal."""
        self.metrics.refused[error.code] += 1

    def close(self) -> None:
        """Let go of the threads."""
        self._turns.close()
        self._long_turns.close()


def _size(texts: list[str]) -> int:
    return sum(map(sys.getsizeof, texts))


def _texts(plan: Plan, conversation: list[Message]) -> list[str]:
    """All that a request's prompt is made of; none of token ids."""
    if plan.prompt is not None:
        return [plan.prompt] if isinstance(plan.prompt, str) else []
    return _parts(conversation)


def _parts(conversation: Sequence[Message]) -> list[str]:
    return [part for _, said in conversation for part in ([said] if isinstance(said, str) else said)]


def _digest(client: str) -> str:
    """A name for the engine, which tells clients apart and need not know who they are."""
    return hashlib.blake2b(client.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


class _Stream:
    """Between the hub and a listener: latencies, and what is stored of the answer."""

    def __init__(
        self, service: Service, plan: Plan, messages: list[Message], listener: Listener, arrived: float, owner: object
    ) -> None:
        self.over = asyncio.Event()
        self.entry = access.current()
        self._service = service
        self._plan = plan
        self._messages = messages
        self._listener = listener
        self._arrived = arrived
        self._owner = owner
        self._last = 0.0
        self._texts: list[str] = []

    def receive(self, event: EngineEvent) -> None:
        self.entry.said(event)
        if isinstance(event, TokensEvent):
            self._measure(len(event.token_ids))
            self._texts.append(event.text)
        else:
            self._finish(event)
            # Before the listener hears of it: what it starts next must find this stream's place free.
            self.over.set()
        self._listener.engine_event(event)

    def _measure(self, tokens: int) -> None:
        now = time.monotonic()
        metrics = self._service.metrics
        if not self._last:
            metrics.time_to_first_token.observe(now - self._arrived)
        elif tokens:
            metrics.inter_token_latency.observe((now - self._last) / tokens, tokens)
        self._last = now

    def _finish(self, event: FinishedEvent) -> None:
        lasted_s = time.monotonic() - self._arrived
        self._service.metrics.finish(event, lasted_s)
        self._service.admission.lasted(lasted_s)
        # A cancelled answer is kept too: people stop an answer and go on with the conversation.
        if event.reason != "failed":
            answer = "".join(self._texts)
            self._service.keep(self._plan, [*self._messages, ("assistant", answer)], self._owner)
