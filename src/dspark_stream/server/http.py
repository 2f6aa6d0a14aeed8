"""The HTTP side: responses and chat completions, streamed as server-sent events or as one body."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from aiohttp import HttpVersion11, web

from dspark_stream.errors import BusyError, InternalError, InvalidRequestError
from dspark_stream.server import access, chat, completions, wire
from dspark_stream.server.bodies import ChatBody, CompletionBody, ResponseBody, decode
from dspark_stream.server.delivery import Delivery, SlowReaderError, bound_buffers
from dspark_stream.server.heads import RequestTimeoutError
from dspark_stream.server.lifecycle import ResponseMachine
from dspark_stream.server.plan import Plan
from dspark_stream.server.service import Service
from dspark_stream.types import EngineEvent, ErrorInfo, FinishedEvent, GenerationRequest

log = logging.getLogger(__name__)

T = TypeVar("T")
Frames = Callable[[wire.ServerEvent], bytes]
"""What one event becomes in an event stream; empty for nothing."""
Chunks = Callable[[wire.ServerEvent, ResponseMachine, int], Sequence[object]]
Whole = Callable[[wire.TerminalEvent, ResponseMachine, int], object]


class BodyTooLargeError(InvalidRequestError):
    """The body is longer than a request may be."""

    status = 413
    code = "body_too_large"


class AnswerCutError(BusyError):
    """The answer ended before it was whole. It is counted among the responses, not among what was refused.

    Args:
        info: What ended it; its ``status`` is the answer's, and where that is 503 ``retry_after_s`` is said too.
    """

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message, param=info.param, retry_after_s=5)
        self.status, self.type, self.code = info.status, info.type, info.code


class UnsupportedMediaTypeError(InvalidRequestError):
    """A body that does not say that it is JSON: a form of a foreign web page could send it."""

    status = 415
    code = "unsupported_media_type"


class HttpApi:
    """Handlers of ``/v1/responses``, ``/v1/chat/completions`` and ``/v1/completions``."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def responses(self, request: web.Request, client: str) -> web.StreamResponse:
        """``POST /v1/responses``."""
        body = await self._body(request, client, ResponseBody)
        plan = self._service.planner.response(body, events=bool(body.stream))
        machine = ResponseMachine(plan)
        if plan.stream:
            return await self._stream(request, client, machine, _response_frames)
        ended = await self._collect(client, machine)
        return json_response(ended.response, headers=_warnings(machine))

    async def chat(self, request: web.Request, client: str) -> web.StreamResponse:
        """``POST /v1/chat/completions``."""
        plan = self._service.planner.chat(await self._body(request, client, ChatBody))
        return await self._completion(request, client, plan, chat.chunks, chat.completion)

    async def completions(self, request: web.Request, client: str) -> web.StreamResponse:
        """``POST /v1/completions``."""
        plan = self._service.planner.completion(await self._body(request, client, CompletionBody))
        return await self._completion(request, client, plan, completions.chunks, completions.completion)

    async def _completion(
        self, request: web.Request, client: str, plan: Plan, chunks: Chunks, whole: Whole
    ) -> web.StreamResponse:
        machine, gamma = ResponseMachine(plan), self._service.info.gamma
        if plan.stream:
            return await self._stream(
                request, client, machine, lambda event: _chat_frames(event, chunks(event, machine, gamma))
            )
        ended = await self._collect(client, machine)
        return json_response(whole(ended, machine, gamma), headers=_warnings(machine))

    async def _body(self, request: web.Request, client: str, kind: type[T]) -> T:
        config = self._service.config
        if request.content_type != "application/json":
            raise UnsupportedMediaTypeError("the body must be JSON, with `Content-Type: application/json`")
        too_large = BodyTooLargeError(f"the request's body is longer than {config.max_message_bytes} bytes")
        if (request.content_length or 0) > config.max_message_bytes:
            raise too_large
        if "Expect" in request.headers and request.version >= HttpVersion11:
            # Now that it is known who asks, and not before.
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the answer has not begun
        data = bytearray()  # not `request.read`, which keeps it as long as the request lasts
        with self._service.admission.holding(client) as memory:
            try:
                async with asyncio.timeout(config.body_timeout_s):
                    async for chunk in request.content.iter_any():
                        if len(data) + len(chunk) > config.max_message_bytes:
                            raise too_large
                        memory.grow(len(chunk))
                        data += chunk
            except TimeoutError:
                raise RequestTimeoutError(
                    f"the request's body did not arrive within {config.body_timeout_s:g} s"
                ) from None
            except web.RequestPayloadError:
                raise InvalidRequestError(
                    "the request's body is not framed as its head says", code="invalid_body"
                ) from None
            return decode(bytes(data), kind, most=self._service.most_values)

    async def _collect(self, client: str, machine: ResponseMachine) -> wire.TerminalEvent:
        listener = _Listener(machine, lambda event: None, self._service)
        await self._service.run(machine.plan, client, listener)
        ended = listener.terminal
        if ended is None:
            raise InternalError("the response has no end")
        if isinstance(ended, wire.Failed) and machine.error is not None:
            raise AnswerCutError(machine.error)
        if isinstance(ended, wire.Cancelled):
            # Nobody asked for that over HTTP, and it must not look like an answer.
            raise AnswerCutError(wire.error_info(_cut_short()))
        return ended

    async def _stream(
        self, request: web.Request, client: str, machine: ResponseMachine, frames: Frames
    ) -> web.StreamResponse:
        service = self._service
        answer = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                # Or nginx would collect the tokens that we took care to send at once.
                "X-Accel-Buffering": "no",
            }
        )

        async def write(event: wire.ServerEvent) -> None:
            data = frames(event)
            if data:
                await answer.write(data)
            if isinstance(event, wire.TerminalEvent):
                access.current().whole = True

        async def keep_alive() -> None:
            await answer.write(b": still here\n\n")

        delivery = Delivery(
            write, engine=service.engine, config=service.config, metrics=service.metrics, idle=keep_alive
        )
        listener = _Listener(machine, lambda event: delivery.put(event, machine.response_id), service)
        running = asyncio.create_task(service.run(machine.plan, client, listener))
        begun = asyncio.create_task(listener.begun.wait())
        writer: asyncio.Task[None] | None = None
        try:
            # A refusal is still an HTTP error: the head is written once the engine has the request.
            await asyncio.wait((running, begun), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            delivery.add_stream(machine.response_id)
            answer.headers.update(_warnings(machine))
            await answer.prepare(request)
            if request.transport is not None:
                bound_buffers(request.transport, service.config)
            writer = asyncio.create_task(delivery.run())
            await asyncio.wait((running, writer), return_when=asyncio.FIRST_COMPLETED)
            delivery.finish()
            await writer
            await answer.write_eof()
        except SlowReaderError as error:
            log.info("closing a slow reader: %s", error)
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            log.debug("the client of %s has gone", machine.response_id)
        finally:
            # Also when this handler is cancelled, because the client has gone.
            tasks = [task for task in (running, begun, writer) if task is not None]
            for task in tasks:
                task.cancel()
            service.metrics.merged_deltas += delivery.outbox.merged
            await asyncio.gather(*tasks, return_exceptions=True)
        return answer


class _Listener:
    """Runs a response's machine, and keeps its end: there is one even if the machine breaks."""

    def __init__(self, machine: ResponseMachine, put: Callable[[wire.ServerEvent], None], service: Service) -> None:
        self.begun = asyncio.Event()
        self.terminal: wire.TerminalEvent | None = None
        self._machine = machine
        self._put = put
        self._service = service

    def started(self, taken: GenerationRequest | None) -> None:
        for event in self._machine.begin(taken):
            self._put(event)
        self.begun.set()

    def engine_event(self, event: EngineEvent) -> None:
        if self.terminal is not None:
            return
        try:
            self._say(self._machine.receive(event))
        except Exception:
            log.exception("the answer %s cannot be gone on with", self._machine.response_id)
            if not isinstance(event, FinishedEvent):
                self._service.engine.cancel(self._machine.response_id)
            error = wire.error_info(InternalError("the server lost track of this response"))
            self._say(self._machine.fail(error))

    def _say(self, events: Sequence[wire.ServerEvent]) -> None:
        for said in events:
            self._put(said)
            if isinstance(said, wire.TerminalEvent):
                self.terminal = said


def _cut_short() -> InternalError:
    return InternalError("the answer was cut before its end", code="cancelled")


def json_response(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON body."""
    return web.Response(
        body=wire.encode(body),
        status=status,
        content_type="application/json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )


def _warnings(machine: ResponseMachine) -> dict[str, str]:
    """For those who do not look into the body."""
    return {"X-Dspark-Warning": "; ".join(machine.warnings)} if machine.warnings else {}


def _response_frames(event: wire.ServerEvent) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (wire.event_type(event).encode(), wire.encode(event))


def _chat_frames(event: wire.ServerEvent, chunks: Sequence[object]) -> bytes:
    if isinstance(event, wire.Failed):
        frames = [b"data: %s\n\n" % wire.encode({"error": event.response.error})]
    elif isinstance(event, wire.Cancelled):
        frames = [b"data: %s\n\n" % wire.encode({"error": wire.error_body(_cut_short())})]
    else:
        frames = [b"data: %s\n\n" % wire.encode(chunk) for chunk in chunks]
    if isinstance(event, wire.TerminalEvent):
        frames.append(b"data: [DONE]\n\n")
    return b"".join(frames)
